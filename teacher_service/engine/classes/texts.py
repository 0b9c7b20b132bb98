"""Rows of texts and their classes, as engines that tell classes apart see them.

A document of a row is a text and its class, which its one position with loss predicts.

P texts: documents of rows   C classes
"""

import numpy as np

from shared.data.rows import Rows
from shared.targets.asks.classes import COLUMN


def texts_of(rows: Rows) -> list[np.ndarray]:
    """The tokens of each text before its class."""
    parts = zip(rows.column("input_ids"), rows.column("doc_starts"), _places(rows), strict=True)
    return [
        ids[start : place + 1]
        for ids, starts, places in parts
        for start, place in zip(starts, places, strict=True)
    ]


def labels_of(rows: Rows) -> np.ndarray:
    """The number of each text's class [P], int64."""
    pairs = zip(rows.column("input_ids"), _places(rows), strict=True)
    found = [np.zeros(0, np.int64), *(ids[places + 1] for ids, places in pairs)]
    return np.concatenate(found).astype(np.int64)


def class_columns(rows: Rows, logprobs_PC: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of an answer, float32: log-probabilities of the classes [P, C], and of each
    text's own."""
    label_P = labels_of(rows)
    return {COLUMN: logprobs_PC, "label_logprob": logprobs_PC[np.arange(len(label_P)), label_P]}


def _places(rows: Rows) -> list[np.ndarray]:
    """The positions with loss of each row, one of each of its documents."""
    return [np.flatnonzero(mask) for mask in rows.column("loss_mask")]

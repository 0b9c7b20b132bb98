"""Rows of a text and its class, as engines that tell classes apart see them.

P rows   C classes
"""

import numpy as np

from shared.data.rows import Rows
from shared.targets.asks.classes import COLUMN


def texts_of(rows: Rows) -> list[np.ndarray]:
    """The tokens of each row before its class, which its one position with loss predicts."""
    ids, masks = rows.column("input_ids"), rows.column("loss_mask")
    return [own[: int(mask.argmax()) + 1] for own, mask in zip(ids, masks, strict=True)]


def labels_of(rows: Rows) -> np.ndarray:
    """The number of each row's class [P], int64."""
    pairs = zip(rows.column("input_ids"), texts_of(rows), strict=True)
    return np.array([ids[len(text)] for ids, text in pairs], np.int64)


def class_columns(rows: Rows, logprobs_PC: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of an answer, float32: log-probabilities of the classes [P, C], and of each row's
    own."""
    label_P = labels_of(rows)
    return {COLUMN: logprobs_PC, "label_logprob": logprobs_PC[np.arange(len(rows)), label_P]}

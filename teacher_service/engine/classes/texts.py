"""Rows of texts and their classes, as engines that tell classes apart see them.

A document of a row is a text, and after it the number of the class that each of its positions with
loss has: of whole texts one, of words several.

P texts: documents of rows   N positions with loss   C classes
"""

from collections.abc import Iterator

import numpy as np

from shared.data.rows import Rows
from shared.targets.asks.classes import COLUMN


def texts_of(rows: Rows) -> list[np.ndarray]:
    """The tokens of each text, without its classes."""
    return [ids[: len(ids) - int(mask.sum())] for ids, mask in _documents(rows)]


def places_of(rows: Rows) -> list[np.ndarray]:
    """The positions with loss of each text."""
    return [np.flatnonzero(mask) for _, mask in _documents(rows)]


def labels_of(rows: Rows) -> np.ndarray:
    """The number of the class of each position with loss [N], int64."""
    found = [ids[len(ids) - int(mask.sum()) :] for ids, mask in _documents(rows)]
    return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)


def class_columns(rows: Rows, logprobs_NC: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of an answer, float32: log-probabilities of the classes [N, C], and of each
    position's own."""
    label_N = labels_of(rows)
    return {COLUMN: logprobs_NC, "label_logprob": logprobs_NC[np.arange(len(label_N)), label_N]}


def names_of(rows: Rows) -> list[str]:
    """The name of each text's row."""
    counts = [len(starts) for starts in rows.column("doc_starts")]
    return np.repeat(rows.names(), counts).tolist()


def _documents(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and loss mask of each document."""
    columns = (rows.column(name) for name in ("input_ids", "loss_mask", "doc_starts"))
    for ids, mask, starts in zip(*columns, strict=True):
        yield from zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True)

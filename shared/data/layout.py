"""Lay a scoring unit out as the padded batch a model runs on; the one place labels are shifted.

Teacher and student use the same function on the same rows, so entry n of a SoftTargets and
entry n of the student's loss are the same position.

B lines of the batch   T padded length   N positions with loss, row by row
"""

from dataclasses import dataclass

import numpy as np

from shared.data.rows import Rows

PAD_ID = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A padded batch. Padding is a document of its own, so no attention mask is needed."""

    input_ids_BT: np.ndarray  # int64
    position_ids_BT: np.ndarray  # int64; restarts at each document
    loss_index_N: np.ndarray  # int64 into the flattened [B*T]
    label_N: np.ndarray  # int64; the token that position predicts
    row_N: np.ndarray  # int64; the row of the unit the position belongs to
    # int64; the document of the unit it belongs to, counted through all rows, with loss or without.
    document_N: np.ndarray


def padded_length(length: int) -> int:
    """The fixed ladder of lengths: multiples of 32 to 256, of 64 to 1,024, of 256 beyond."""
    step = 32 if length <= 256 else 64 if length <= 1024 else 256
    return max(step, -(-length // step) * step)


def lay_out(rows: Rows, *, packed: bool) -> Layout:
    """Pad rows to one length. `packed` keeps a row's documents on one line, position ids
    restarting; otherwise every document gets a line of its own (for models that would let
    packed documents attend to each other). An empty unit becomes one line of padding."""
    ids, starts, masks = (rows.column(c) for c in ("input_ids", "doc_starts", "loss_mask"))
    lines = _lines(ids, starts, packed=packed)
    width = padded_length(max((stop - start for _, start, stop in lines), default=0))
    input_ids = np.full((max(1, len(lines)), width), PAD_ID, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(input_ids), 1))
    first_document = np.cumsum([0, *(len(documents) for documents in starts)])
    flat, labels, owners, documents = [], [], [], []
    for line, (row, start, stop) in enumerate(lines):
        length = stop - start
        input_ids[line, :length] = ids[row][start:stop]
        positions[line, length:] -= length
        for document in starts[row][(starts[row] > start) & (starts[row] < stop)]:
            positions[line, document - start : length] = np.arange(stop - document)
        counted = start + np.flatnonzero(masks[row][start:stop])
        flat.append(line * width + counted - start)
        labels.append(ids[row][counted + 1])
        owners.append(np.full(len(counted), row))
        within = np.searchsorted(starts[row], counted, side="right") - 1
        documents.append(first_document[row] + within)
    found = (_joined(part) for part in (flat, labels, owners, documents))
    return Layout(input_ids, positions, *found)


def _lines(ids, starts, *, packed: bool) -> list[tuple[int, int, int]]:
    """(row, first token, last token + 1) of each line of the batch."""
    if packed:
        return [(row, 0, len(tokens)) for row, tokens in enumerate(ids)]
    return [
        (row, int(start), int(stop))
        for row, tokens in enumerate(ids)
        for start, stop in zip(starts[row], [*starts[row][1:], len(tokens)], strict=True)
    ]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

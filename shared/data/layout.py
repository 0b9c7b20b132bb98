"""Lay a scoring unit out as the padded batch a model runs on; the one place labels are shifted.

Teacher and student use the same function on the same rows, so entry n of a SoftTargets and
entry n of the student's loss are the same position.

B lines of the batch   T padded length   N positions with loss, row by row   P forward passes
M positions with loss of one pass
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows

PAD_ID = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A padded batch. Padding is a document of its own, so no attention mask is needed, and has no
    position that no document of its pass has."""

    input_ids_BT: np.ndarray  # int64
    position_ids_BT: np.ndarray  # int64; restarts at each document
    length_B: np.ndarray  # int64; tokens of a line that are not padding
    loss_index_N: np.ndarray  # int64 into the flattened [B*T]
    label_N: np.ndarray  # int64; the token that position predicts
    row_N: np.ndarray  # int64; the row of the unit the position belongs to
    # int64; the document of the unit it belongs to, counted through all rows, with loss or without.
    document_N: np.ndarray
    pass_B: np.ndarray  # int64; the forward pass of each line
    width_P: np.ndarray  # int64; tokens of the lines of each pass, T where there is one

    def parts(self) -> "list[Part]":
        """The batches of the forward passes, in their order; of a single one, the whole."""
        width = self.input_ids_BT.shape[1]
        line_N, column_N = np.divmod(self.loss_index_N, width)
        found = []
        for number, narrow in enumerate(self.width_P.tolist()):
            lines = np.flatnonzero(self.pass_B == number)
            entry_M = np.flatnonzero(self.pass_B[line_N] == number)
            index_M = np.searchsorted(lines, line_N[entry_M]) * narrow + column_N[entry_M]
            ids_BT, positions_BT = self.input_ids_BT[lines, :narrow], self.position_ids_BT[lines]
            found.append(Part(ids_BT, positions_BT[:, :narrow], index_M, entry_M))
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """The batch of one forward pass."""

    input_ids_BT: np.ndarray  # int64
    position_ids_BT: np.ndarray  # int64
    loss_index_N: np.ndarray  # int64 into the flattened [B*T] of the part
    entry_N: np.ndarray  # int64; the same positions among those of the unit


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of a row on a line of the batch."""

    row: int
    start: int
    stop: int
    documents: np.ndarray  # first tokens of its documents, from the start of the line

    @property
    def length(self) -> int:
        """Tokens."""
        return self.stop - self.start

    @property
    def longest(self) -> int:
        """Tokens of its longest document."""
        return int(np.diff([*self.documents, self.length]).max(initial=0))

    def positions(self) -> np.ndarray:
        """The place of every token in its document."""
        lengths = np.diff([*self.documents, self.length])
        return np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else lengths


def padded_length(length: int) -> int:
    """The fixed ladder of lengths: multiples of 32 to 256, of 64 to 1,024, of 256 beyond."""
    step = 32 if length <= 256 else 64 if length <= 1024 else 256
    return max(step, -(-length // step) * step)


def lay_out(rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
    """Pad rows to one length, or the rows of each of `passes` to one. `packed` keeps a row's
    documents on one line, position ids restarting, where they may share a pass; otherwise every
    document gets a line of its own (for models that would let packed documents attend to each
    other). An empty unit becomes one line of padding."""
    ids, starts, masks = (rows.column(c) for c in ("input_ids", "doc_starts", "loss_mask"))
    lines = list(_lines(ids, starts, packed=packed, passes=passes))
    pass_B, width_P = _widths(lines, passes)
    width = int(width_P.max())
    input_ids = np.full((max(1, len(lines)), width), PAD_ID, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (len(input_ids), 1))
    highest_P = np.ones(len(width_P), np.int64)
    np.maximum.at(highest_P, pass_B[: len(lines)], [line.longest for line in lines])
    first_document = np.cumsum([0, *(len(documents) for documents in starts)])
    flat, labels, owners, documents = [], [], [], []
    for number, line in enumerate(lines):
        row, length = line.row, line.length
        input_ids[number, :length] = ids[row][line.start : line.stop]
        positions[number, :length] = line.positions()
        positions[number, length:] = np.arange(width - length) % highest_P[pass_B[number]]
        counted = line.start + np.flatnonzero(masks[row][line.start : line.stop])
        flat.append(number * width + counted - line.start)
        labels.append(ids[row][counted + 1])
        owners.append(np.full(len(counted), row))
        within = np.searchsorted(starts[row], counted, side="right") - 1
        documents.append(first_document[row] + within)
    found = [_joined(part) for part in (flat, labels, owners, documents)]
    lengths = np.zeros(len(input_ids), np.int64)
    lengths[: len(lines)] = [line.length for line in lines]
    return Layout(input_ids, positions, lengths, *found, pass_B=pass_B, width_P=width_P)


def _lines(ids, starts, *, packed: bool, passes: Passes) -> Iterator[Line]:
    """The lines of the batch: rows, or their documents."""
    for row, tokens in enumerate(ids):
        first = np.asarray(starts[row])
        lengths = np.diff([*first, len(tokens)]).tolist()
        if packed and len({passes.side(length) for length in lengths}) <= 1:
            yield Line(row, 0, len(tokens), first)
            continue
        for start, length in zip(first.tolist(), lengths, strict=True):
            yield Line(row, start, start + length, np.zeros(1, np.int64))


def _widths(lines: list[Line], passes: Passes) -> tuple[np.ndarray, np.ndarray]:
    """The pass of each line, and the width of each pass."""
    if not lines:
        return np.zeros(1, np.int64), np.array([padded_length(0)])
    pass_B = passes.group([line.length for line in lines], [line.longest for line in lines])
    width_P = np.zeros(pass_B.max() + 1, np.int64)
    np.maximum.at(width_P, pass_B, [line.length for line in lines])
    is_padded = passes.padded and passes.shared
    return pass_B, np.array([padded_length(int(w)) for w in width_P]) if is_padded else width_P


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

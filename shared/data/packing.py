"""From encoded documents to rows of at most the context: split what is too long, fill rows.

T tokens of a piece
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from shared.data.row_store import RaggedRows
from shared.errors import DataError
from shared.images.row_image import RowImage
from shared.text.framing import Encoded

OPEN_ROWS = 64  # a piece goes into the fullest of these that has room
LEAST_ROOM = 4  # a prompt stands with every piece where it leaves a quarter of the context
TooLong = Literal["split", "split_with_prompt", "cut", "drop", "refuse"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or as much of a long one as a row holds."""

    key: int  # of the document, or of those that are held out together
    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # uint8 [T], the last is 0
    whole: bool = True  # False: a part of the document
    second: int = 0  # see `Encoded`
    images: tuple[RowImage, ...] = ()  # of the document


@dataclass(slots=True)
class Fit:
    """What fitting documents into the context did to them."""

    documents: int = 0
    too_long: int = 0  # split, cut or dropped
    without_loss: int = 0  # dropped
    beyond_context: int = 0  # of those, documents that would be learnt in a longer context alone
    duplicates: int = 0  # of documents that came before; they are learnt again
    without_prompt: int = 0  # split so that a later piece is learnt without the prompt


def pieces_of(
    documents: Iterable[Encoded], *, context: int, too_long: TooLong, fit: Fit
) -> Iterator[Piece]:
    """Pieces of at most `context` tokens, counted in `fit`; pieces without loss are dropped.

    Raises DataError for a document that is too long where `too_long` is "refuse".
    """
    seen: set[int] = set()
    for document in documents:
        fit.documents += 1
        length = len(document.input_ids)
        fit.too_long += length > context
        fit.duplicates += document.key in seen
        seen.add(document.key)
        if length > context and too_long == "refuse":
            raise DataError(
                f"{document.where} has {length:,} tokens, more than data.context {context:,}; "
                "raise the context, or set data.too_long to split, cut or drop"
            )
        kept = [p for p in _pieces(document, context, too_long) if p.loss_mask.any()]
        fit.without_loss += not kept
        is_dropped = too_long == "drop" and length > context
        fit.beyond_context += not kept and not is_dropped and bool(document.loss_mask.any())
        fit.without_prompt += _loses_prompt(document, kept)
        yield from kept


def _pieces(document: Encoded, context: int, too_long: TooLong) -> list[Piece]:
    length, opening = len(document.input_ids), document.opening
    if length <= context or too_long == "cut":
        return [_piece(document, 0, min(context, length))]
    if too_long == "drop":
        return []
    if too_long == "split_with_prompt" and context - opening >= context // LEAST_ROOM:
        return _with_prompt(document, context)
    starts = list(range(0, length, context))
    if length - starts[-1] == 1:  # an end by itself would never be predicted
        starts[-1] -= 1
    return [_piece(document, *ends) for ends in zip(starts, [*starts[1:], length], strict=True)]


def _with_prompt(document: Encoded, context: int) -> list[Piece]:
    """Pieces that begin with the prompt. A later one goes on with the last token of the piece
    before it, so that every token is learnt once, after the one that stands before it."""
    opening, length = document.opening, len(document.input_ids)
    pieces, at = [_piece(document, 0, context)], context
    while at < length:
        first = at - 1 if document.loss_mask[at - 1] else at
        at = min(length, first + context - opening)
        rest = _piece(document, first, at)
        ids = np.concatenate([document.input_ids[:opening], rest.input_ids])
        mask = np.concatenate([np.zeros(opening, np.uint8), rest.loss_mask])
        pieces.append(Piece(_family(document), ids, mask, whole=False))
    return pieces


def _loses_prompt(document: Encoded, kept: Sequence[Piece]) -> bool:
    opening = document.input_ids[: document.opening]
    return document.has_prompt and any(
        not np.array_equal(piece.input_ids[: document.opening], opening) for piece in kept
    )


def _piece(document: Encoded, start: int, stop: int) -> Piece:
    ids = document.input_ids[start:stop]
    mask = document.loss_mask[start:stop].copy()
    mask[-1:] = 0
    is_whole = len(ids) == len(document.input_ids)
    second = document.second if is_whole else 0
    return Piece(_family(document), ids, mask, is_whole, second, document.images)


def _family(document: Encoded) -> int:
    return document.key if document.family is None else document.family


@dataclass(slots=True)
class _OpenRow:
    room: int
    pieces: list[Piece] = field(default_factory=list)


def pack(pieces: Iterable[Piece], *, context: int) -> RaggedRows:
    """Rows of at most `context` tokens, filled best fit over a window of open rows.

    Depends on the pieces and their order alone.
    """
    rows = RaggedRows([], [], [])
    window: list[_OpenRow] = []
    for piece in pieces:
        length = len(piece.input_ids)
        fitting = [row for row in window if row.room >= length]
        if fitting:
            row = min(fitting, key=_room)
        else:
            if len(window) == OPEN_ROWS:
                _close(min(window, key=_room), window, rows)
            row = _OpenRow(context)
            window.append(row)
        row.room -= length
        row.pieces.append(piece)
        if row.room == 0:
            _close(row, window, rows)
    for row in list(window):
        _close(row, window, rows)
    return rows


def unpacked(pieces: Iterable[Piece]) -> RaggedRows:
    """Each piece as a row of its own."""
    rows = RaggedRows([], [], [])
    for piece in pieces:
        _close(_OpenRow(0, [piece]), [], rows)
    return rows


def chosen_rows(rows: RaggedRows, indices: Sequence[int]) -> RaggedRows:
    """The rows at `indices`, in that order."""
    parts = (rows.input_ids, rows.doc_starts, rows.loss_masks)
    images = [rows.images[i] for i in indices] if rows.images else []
    return RaggedRows(*([part[i] for i in indices] for part in parts), images=images)


def _room(row: _OpenRow) -> int:
    return row.room


def _close(row: _OpenRow, window: list[_OpenRow], rows: RaggedRows) -> None:
    window[:] = [other for other in window if other is not row]
    lengths = [len(piece.input_ids) for piece in row.pieces]
    rows.input_ids.append(np.concatenate([piece.input_ids for piece in row.pieces]))
    firsts = zip(np.cumsum([0, *lengths[:-1]]).tolist(), row.pieces, strict=True)
    starts = [at for first, p in firsts for at in (first, first + p.second)[: 1 + (p.second > 0)]]
    rows.doc_starts.append(np.array(starts, np.int32))
    rows.loss_masks.append(np.concatenate([piece.loss_mask for piece in row.pieces]))
    rows.images.append(tuple(image for piece in row.pieces for image in piece.images))

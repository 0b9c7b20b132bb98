"""Which positions of a student's row and of its teacher's, of another tokenizer, are about the same
bytes.

Where tokens of both end at the same byte of a document, both have read the same text, and the next
token of each begins there. Such places cut a document into spans. A span of one token in both is
the same token; any other is merged: by the chain rule its probability is the product of those of
its tokens, in each tokenization.

A token that nothing predicts, or that is not learnt, has no position with loss. A span is whole
where all its tokens of both models have one; others are compared by no divergence.

N positions with loss of the student's rows   M those of the teacher's   S spans of all documents
T tokens of a document   C units of a document (`shared.across.token_pair`)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shared.across.token_pair import SideTokens, TokenPair
from shared.data.rows import Rows

NONE = -1


@dataclass(frozen=True, slots=True)
class Alignment:
    """The spans of a unit's rows, each row's documents in order."""

    span_N: np.ndarray  # int64, the span that a position's label is in; NONE: in none
    span_M: np.ndarray
    label_M: np.ndarray  # int64, the teacher's ids
    is_whole_S: np.ndarray  # bool
    is_merged_S: np.ndarray  # bool, of those that are whole
    # bool: the teacher's first token has a space that the student's has not, or the other way
    # round, as tokenizers put one before a text.
    is_shifted_S: np.ndarray

    @property
    def tokens_S(self) -> np.ndarray:
        """Positions of the student in each span, int64."""
        held = self.span_N[self.span_N != NONE]
        return np.bincount(held, minlength=len(self.is_whole_S))

    def firsts(self, span_X: np.ndarray) -> np.ndarray:
        """The first position of each span [S] among positions [X], NONE where there is none."""
        first_S = np.full(len(self.is_whole_S), NONE, np.int64)
        held = np.flatnonzero(span_X != NONE)[::-1]
        first_S[span_X[held]] = held
        return first_S


@dataclass(frozen=True, slots=True)
class _Document:
    """One side's tokens of a document with the units at which each ends."""

    ids_T: np.ndarray
    is_label_T: np.ndarray  # bool, whether a position with loss predicts the token
    end_T: np.ndarray  # int64
    is_lone_T: np.ndarray  # bool, the space before a text as a token of its own, left out

    @property
    def start_T(self) -> np.ndarray:
        """The units at which tokens begin."""
        return np.concatenate([[0], self.end_T[:-1]])

    @property
    def length(self) -> int:
        """Units."""
        return int(self.end_T[-1])


@dataclass(slots=True)
class _Spans:
    """Spans of the documents so far."""

    count: int = 0
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)  # see `Alignment`

    def add(self, student: _Document, teacher: _Document, *, shifted: bool) -> None:
        """Count those of a document."""
        own_ends, others_ends = (np.append(0, side.end_T) for side in (student, teacher))
        common = np.intersect1d(own_ends, others_ends)
        num = len(common) - 1
        whole, several, own = np.ones(num, bool), np.zeros(num, bool), []
        for side in (student, teacher):
            span_T = _span_of(side, common)
            counts = np.bincount(span_T[span_T != NONE], minlength=num)
            learnt_T = span_T[side.is_label_T]
            whole &= np.bincount(learnt_T[learnt_T != NONE], minlength=num) == counts
            several |= counts > 1
            own.append(np.where(learnt_T == NONE, NONE, learnt_T + self.count))
        is_shifted_S = np.zeros(num, bool)
        is_shifted_S[:1] = shifted
        merged = whole & (several | is_shifted_S)
        labels = teacher.ids_T[teacher.is_label_T]
        self.parts.append((*own, labels, whole, merged, is_shifted_S))
        self.count += num

    def skip(self, student: _Document, teacher: _Document) -> None:
        """Positions of a document whose texts differ are in no span."""
        sides = [np.full(int(side.is_label_T.sum()), NONE) for side in (student, teacher)]
        nothing = np.zeros(0, bool)
        labels = teacher.ids_T[teacher.is_label_T]
        self.parts.append((*sides, labels, nothing, nothing, nothing))


def align(student: Rows, teacher: Rows, pair: TokenPair) -> Alignment:
    """The spans of rows that belong to each other, one by one and document by document."""
    spans = _Spans()
    for own, others in zip(_documents(student), _documents(teacher), strict=True):
        assert len(own) == len(others), "a row of the teacher's has the documents of the student's"
        for one, other in zip(own, others, strict=True):
            measured = measure(one, other, pair)
            if measured is None:
                spans.skip(_bare(*one), _bare(*other))
            else:
                spans.add(*measured[:2], shifted=measured[2])
    empty = (*(np.zeros(0, np.int64),) * 3, *(np.zeros(0, bool),) * 3)
    return Alignment(*(np.concatenate(part) for part in zip(empty, *spans.parts, strict=True)))


Tokens = tuple[np.ndarray, np.ndarray]  # ids and loss mask of a document


def measure(
    student: Tokens, teacher: Tokens, pair: TokenPair
) -> tuple[_Document, _Document, bool] | None:
    """Both sides of a document, and whether one alone has a space before the text; None where they
    are not as long as each other."""
    for own_less, others_less in ((False, False), (pair.adds_space, False), (False, True)):
        own = _measured(*student, pair.student, less_space=own_less)
        others = _measured(*teacher, pair.teacher, less_space=others_less)
        if own.length == others.length:
            return own, others, own_less or others_less
    return None


def _bare(ids: np.ndarray, mask: np.ndarray) -> _Document:
    return _Document(ids, _labels(mask), np.zeros(len(ids), np.int64), np.zeros(len(ids), bool))


def _labels(mask: np.ndarray) -> np.ndarray:
    """Which tokens are predicted by a position with loss."""
    return np.concatenate([[False], mask[:-1] > 0])


def _measured(
    ids: np.ndarray, mask: np.ndarray, side: SideTokens, *, less_space: bool
) -> _Document:
    """Where each token ends, the beginning of a text having no unit; `less_space` leaves a space
    before the text out, where there is one. A token that is this space alone goes with the one
    after it."""
    width_T, is_lone_T = side.width_V[ids].astype(np.int64), np.zeros(len(ids), bool)
    first = int(len(ids) > 0 and ids[0] == side.bos)
    width_T[:first] = 0
    if less_space and first < len(ids) and side.spaced_V[ids[first]]:
        width_T[first] -= 1
        is_lone_T[first] = width_T[first] == 0
    return _Document(ids, _labels(mask), np.cumsum(width_T, dtype=np.int64), is_lone_T)


def _span_of(document: _Document, common: np.ndarray) -> np.ndarray:
    """The span of each token; NONE for those without a unit."""
    span_T = np.searchsorted(common, document.start_T, side="right") - 1
    has_units_T = document.end_T > document.start_T
    return np.where(has_units_T | document.is_lone_T, np.minimum(span_T, len(common) - 2), NONE)


def _documents(rows: Rows) -> Iterator[list[Tokens]]:
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    for ids, starts, mask in zip(*columns, strict=True):
        cuts = starts[1:]
        yield list(zip(np.split(ids, cuts), np.split(mask, cuts), strict=True))

"""Tokens of two vocabularies in groups: those whose text begins with the same token of both.

Where both models have read the same bytes, the next token of each begins there, and the shorter of
the two is the beginning of the longer. A token that one tokenizer alone has is read by the other;
the first token which that one makes of it is, where need be, read by the first one again, and so
on, until a token of both is found: its group. So " com", which the other writes as " c" and "om",
is in the group of " c", beside that one's own " c". A token that is a part of a character, or that
the other does not write, goes with the longest token of both that its bytes begin with. The groups
part both vocabularies alike, and the probability of a group is what each model says of nearly the
same event: text is seldom cut so that the next tokens are of two groups.

V ids of the student   W ids of the teacher
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from shared.across.token_bytes import TokenBytes
from shared.across.token_pair import ABSENT, TokenPair

# Texts after which a token is read, until it begins a token there: at the beginning of a text
# tokenizers put a space, and there are texts that go on in the same token.
ANCHORS = ("\n", "a", ".")


class Encoder(Protocol):
    """What is asked of a tokenizer; transformers' fast ones fit."""

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Token ids of texts, under `input_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class Reader:
    """A tokenizer, and what is known of its tokens."""

    tokens: TokenBytes
    encoder: Encoder


def in_groups(pair: TokenPair, student: Reader, teacher: Reader, *, student_rows: int) -> TokenPair:
    """The pair with every token in its group, which is named by the student's id of the token of
    both. A token whose text leads to none is a group of its own for the student, and absent for the
    teacher."""
    group_V = np.full(max(student_rows, len(student.tokens)), ABSENT, np.int32)
    group_W = np.full(max(len(pair.student_of_W), len(teacher.tokens)), ABSENT, np.int32)
    group_W[: len(pair.student_of_W)] = pair.student_of_W
    shared = pair.student_of_W[pair.student_of_W != ABSENT]
    group_V[shared] = shared
    sides = {
        "student": (group_V, group_W, first_tokens(student.tokens, teacher)),
        "teacher": (group_W, group_V, first_tokens(teacher.tokens, student)),
    }
    sides_of = {"student": student, "teacher": teacher}
    paired = np.flatnonzero(pair.student_of_W != ABSENT)
    known = {teacher.tokens.texts[index]: pair.student_of_W[index] for index in paired}
    lengths = [
        (len(text), side, index)
        for side, reader in sides_of.items()
        for index, text in enumerate(reader.tokens.texts)
        if text and sides[side][0][index] == ABSENT
    ]
    for _, side, index in sorted(lengths):  # what a token is read as is shorter, and known by then
        own, others, first = sides[side]
        if first[index] != ABSENT:
            own[index] = others[first[index]]
        if own[index] == ABSENT:
            own[index] = _longest(sides_of[side].tokens.texts[index] or b"", known)
    own_V = np.arange(student_rows, dtype=np.int32)
    found_V = np.where(group_V[:student_rows] == ABSENT, own_V, group_V[:student_rows])
    return replace(pair, student_of_W=group_W[: len(pair.student_of_W)], group_V=found_V)


def _longest(text: bytes, known: Mapping[bytes | None, int]) -> int:
    """What is known of the longest beginning of a text, short of all of it."""
    found = (known[text[:end]] for end in range(len(text) - 1, 0, -1) if text[:end] in known)
    return next(found, ABSENT)


def first_tokens(tokens: TokenBytes, reader: Reader) -> np.ndarray:
    """The first token that a reader makes of the text of each, within a text; ABSENT of what is no
    whole text, or that the reader writes in another way."""
    first = np.full(len(tokens), ABSENT, np.int64)
    texts = dict(_texts(tokens))
    for anchor in ANCHORS:
        for index, found in _after(anchor, texts, reader):
            first[index] = found
            del texts[index]
    return first


def _texts(tokens: TokenBytes) -> Iterator[tuple[int, str]]:
    """Those that are whole characters."""
    for index, text in enumerate(tokens.texts):
        try:
            if text:
                yield index, text.decode()
        except UnicodeDecodeError:
            continue


def _after(anchor: str, texts: Mapping[int, str], reader: Reader) -> list[tuple[int, int]]:
    """By index of a text, the token that begins where the anchor before the text ends."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    lines = [anchor + text for text in texts.values()]
    read = reader.encoder(lines, **options)["input_ids"]
    begins, found = len(anchor.encode()) + reader.tokens.adds_space, []
    for index, ids in zip(texts, read, strict=True):
        lengths = [len(reader.tokens.texts[token] or b"") for token in ids]
        place = np.searchsorted(np.cumsum(lengths), begins) + 1
        start = reader.tokens.texts[ids[place]] if place < len(ids) else None
        as_it_is = start and texts[index].encode().startswith(start)
        if as_it_is and sum(lengths[:place]) == begins:
            found.append((index, ids[place]))
    return found

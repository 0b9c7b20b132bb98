"""Two tokenizers side by side: which tokens are the same bytes, and how far each reaches in a text.

A text is a line of units: a byte is one, and a special token that both have is one. A special token
that the teacher does not have is written out for it, and is its bytes. The beginning of a text is
none, and nor is an end that only one of the two has.

V ids of the student   W ids of the teacher
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from shared.across.token_bytes import TokenBytes

ABSENT = -1


@dataclass(frozen=True, slots=True)
class SideTokens:
    """What is known of one tokenizer's tokens beside the other."""

    width_V: np.ndarray  # int32, units
    spaced_V: np.ndarray  # bool, whether its text begins with a space
    bos: int  # ABSENT where there is none


@dataclass(frozen=True, slots=True)
class TokenPair:
    """What pairs the tokens of a student with those of its teacher."""

    student: SideTokens
    teacher: SideTokens
    # int32: the student's id of the same bytes, or where there are groups, that of the group
    # (`shared.across.groups`), or ABSENT
    student_of_W: np.ndarray
    adds_space: bool  # whether the student's tokenizer puts a space before a text
    group_V: np.ndarray | None = None  # int32: the same of the student's; None: no groups

    @property
    def overlap(self) -> int:
        """Tokens that are the same bytes in both, each of which has a group where there are
        groups."""
        return len(np.unique(self.student_of_W[self.student_of_W != ABSENT]))

    def write(self, path: Path) -> None:
        """To a file of numpy's, under its whole name or not at all."""
        sides = {"student": self.student, "teacher": self.teacher}
        arrays = {
            f"{name}_{field.name}": np.asarray(getattr(side, field.name))
            for name, side in sides.items()
            for field in fields(SideTokens)
        }
        draft = path.with_name(f".{path.name}")
        arrays |= {"student_of_W": self.student_of_W, "adds_space": np.asarray(self.adds_space)}
        arrays |= {} if self.group_V is None else {"group_V": self.group_V}
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)

    @staticmethod
    def read(path: Path) -> "TokenPair":
        """The inverse of `write`."""
        with np.load(path, allow_pickle=False) as found:
            student, teacher = (
                SideTokens(found[f"{n}_width_V"], found[f"{n}_spaced_V"], int(found[f"{n}_bos"]))
                for n in ("student", "teacher")
            )
            group_V = found.get("group_V")
            known = (found["student_of_W"], bool(found["adds_space"]), group_V)
            return TokenPair(student, teacher, *known)


def pair_tokens(
    student: TokenBytes, teacher: TokenBytes, *, student_rows: int, teacher_rows: int
) -> TokenPair:
    """The pair of two tokenizers, for embeddings of so many rows."""
    return TokenPair(
        _side(student, teacher),
        _side(teacher, student),
        _same_bytes(student, teacher, student_rows=student_rows, teacher_rows=teacher_rows),
        student.adds_space,
    )


def written_as(index: int, own: TokenBytes, other: TokenBytes) -> str | None:
    """How a special token is written for the other tokenizer: as that one's, or with its own
    characters; None where it is an end that the other does not have."""
    if index == own.eos:
        return None if other.eos is None else other.specials.get(other.eos)
    return own.specials[index]


def _side(own: TokenBytes, other: TokenBytes) -> SideTokens:
    """Widths of tokens: a special one of both is a unit, of one alone its characters' bytes."""
    width_V = np.array([len(text or b"") for text in own.texts], np.int32)
    shared = set(other.specials.values())
    for index, content in own.specials.items():
        width_V[index] = 1 if content in shared else len(content.encode())
    if own.eos is not None:
        width_V[own.eos] = other.eos is not None
    spaced = [(text or b"").startswith(b" ") for text in own.texts]
    return SideTokens(width_V, np.array(spaced, bool), ABSENT if own.bos is None else own.bos)


def _same_bytes(
    student: TokenBytes, teacher: TokenBytes, *, student_rows: int, teacher_rows: int
) -> np.ndarray:
    """The student's id of each of the teacher's [W]. Where several tokens of one side are the same
    bytes, they are paired in order, those of text before those that name a byte."""
    known = _by_content(student, student_rows)
    found_W = np.full(min(len(teacher), teacher_rows), ABSENT, np.int32)
    for content, ids in _by_content(teacher, teacher_rows).items():
        for index, own in zip(ids, known.get(content, ()), strict=False):
            found_W[index] = own
    return found_W


def _by_content(tokens: TokenBytes, rows: int) -> Mapping[tuple[str, object], list[int]]:
    """Ids by what they stand for."""
    found: dict[tuple[str, object], list[int]] = {}
    for index in sorted(range(min(len(tokens), rows)), key=lambda i: (i in tokens.single, i)):
        text = tokens.texts[index]
        if index == tokens.eos:
            key = ("end", None)
        elif index in tokens.specials:
            key = ("begin", None) if index == tokens.bos else ("special", tokens.specials[index])
        elif text:
            key = ("text", text)
        else:
            continue
        found.setdefault(key, []).append(index)
    return found

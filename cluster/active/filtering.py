"""What of a teacher's answers is learnt: rows that are well formed, new and no validation text.

An answer is JSON, an object a row; text around it is passed over.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.text.formats import INVALID

Reason = Literal[
    "malformed", "empty", "unknown class", "too long", "in training", "written before",
    "in validation", "nothing to correct", "wrong answer", "budget used up",
]  # fmt: skip
UNDECODED = "\ufffd"  # of tokens that are no text


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with its response."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that nobody learns, or an answer without one."""

    text: str
    reason: Reason


def rows_in(answer: str) -> list[Row]:
    """The rows of an answer, in order: objects with a prompt and a response, both of them text."""
    listed = (value if isinstance(value, list) else [value] for value in _values(answer))
    found = (_row(one) for values in listed for one in values)
    return [row for row in found if row is not None]


def plain(text: str) -> str:
    """A text with single spaces alone."""
    return " ".join(text.split())


def same(text: str) -> str:
    """What two prompts have in common that are the same: all but case, spaces and a last mark."""
    return " ".join(text.casefold().split()).rstrip(" .!?")


def _values(text: str) -> Iterable[Any]:
    """JSON values that begin with a brace or a bracket, outermost first."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at] in "{[":
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                at += 1
            else:
                yield value
        else:
            at += 1


def _row(value: Any) -> Row | None:
    if not isinstance(value, dict):
        return None
    prompt, response = value.get("prompt"), value.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str):
        return None
    if any(INVALID.search(part) or UNDECODED in part for part in (prompt, response)):
        return None
    return Row(prompt.strip(), plain(response))


@dataclass(slots=True)
class Sieve:
    """Decides row by row, and remembers what it kept."""

    training: frozenset[str]  # prompts as `same` has them, the user's own
    validation: frozenset[str]
    classes: frozenset[str]
    written: set[str] = field(default_factory=set)  # prompts kept before

    def reason(self, row: Row, *, fits: bool) -> Reason | None:
        """Why a row is left out; None: it is kept, and the same prompt will not be again."""
        prompt = same(row.prompt)
        if not prompt or not row.response:
            return "empty"
        if row.response not in self.classes:
            return "unknown class"
        if prompt in self.validation:
            return "in validation"
        if prompt in self.training:
            return "in training"
        if prompt in self.written:
            return "written before"
        if not fits:
            return "too long"
        self.written.add(prompt)
        return None

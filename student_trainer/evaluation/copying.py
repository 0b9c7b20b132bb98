"""Copies of a text in which spans of whole words stand between marks, token by token: what a model
may write next, so that it writes nothing that is not in the text.

Bytes, not characters, since tokens may end within one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.prompts.marking import CLOSES, OPENS
from shared.text.tagged import WORD

OPEN, CLOSE = OPENS.encode(), CLOSES.encode()


class State(NamedTuple):
    """How far a copy is."""

    at: int = 0  # bytes of the text that are written
    start: int = -1  # where the span begins that is open; -1: none is
    mark: int = 0  # bytes of a mark that are written; 0: none is begun
    spans: tuple[tuple[int, int], ...] = ()  # that are closed


@dataclass(frozen=True, slots=True)
class Copying:
    """The copies of one text."""

    text: bytes
    starts: frozenset[int]  # of words
    ends: frozenset[int]

    @staticmethod
    def of(text: bytes) -> "Copying":
        """Of a text in UTF-8."""
        plain = text.decode()
        words = [match.span() for match in WORD.finditer(plain)]
        edges = [[len(plain[:edge].encode()) for edge in word] for word in words]
        return Copying(text, frozenset(a for a, _ in edges), frozenset(b for _, b in edges))

    def after(self, states: Sequence[State], written: Iterable[int]) -> list[State]:
        """Where copies may be once bytes are written; none where they are of no copy."""
        for byte in written:
            states = [later for state in states for later in self._after(state, byte)]
        return list(states)

    def whole(self, states: Sequence[State]) -> State | None:
        """The state among them in which nothing is left to write."""
        done = (s for s in states if s.at == len(self.text) and s.start < 0 and not s.mark)
        return next(done, None)

    def next_bytes(self, states: Sequence[State]) -> set[int]:
        """Bytes of which at least one copy goes on with."""
        likely = {*OPEN, *CLOSE, *(self.text[s.at] for s in states if s.at < len(self.text))}
        return {byte for byte in likely if self.after(states, (byte,))}

    def _after(self, state: State, byte: int) -> Iterable[State]:
        at, start, mark, spans = state
        if mark:
            whole = OPEN if start < 0 else CLOSE
            if whole[mark] != byte:
                return
            if mark + 1 < len(whole):
                yield State(at, start, mark + 1, spans)
            elif start < 0:
                yield State(at, at, 0, spans)
            else:
                yield State(at, -1, 0, (*spans, (start, at)))
            return
        is_open = start >= 0
        if at < len(self.text) and self.text[at] == byte and (not is_open or self._closes(at)):
            yield State(at + 1, start, 0, spans)
        if not is_open and at in self.starts and byte == OPEN[0]:
            yield State(at, start, 1, spans)
        if is_open and at > start and at in self.ends and byte == CLOSE[0]:
            yield State(at, start, 1, spans)

    def _closes(self, at: int) -> bool:
        """Whether a word ends after `at`, where an open span may be closed."""
        return max(self.ends) > at


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by their bytes."""

    tree: dict[int, Any] = field(default_factory=dict)  # byte -> the same of what follows
    END: int = -1  # below which are ids of the tokens that end there

    @staticmethod
    def of(texts: Sequence[bytes | None]) -> "Vocabulary":
        """`texts`: the bytes of each id; None of one that is no text."""
        found = Vocabulary()
        for number, text in enumerate(texts):
            if not text:
                continue
            node = found.tree
            for byte in text:
                node = node.setdefault(byte, {})
            node.setdefault(found.END, []).append(number)
        return found

    def allowed(self, copying: Copying, states: Sequence[State]) -> list[int]:
        """Ids of the tokens with which at least one copy goes on."""
        found: list[int] = []
        waiting = [(self.tree, list(states))]
        while waiting:
            node, here = waiting.pop()
            found += node.get(self.END, ())
            for byte in copying.next_bytes(here):
                if byte in node:
                    waiting.append((node[byte], copying.after(here, (byte,))))
        return found

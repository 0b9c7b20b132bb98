"""Asking the teacher to write: each prompt once, within a budget of tokens.

Every answer is a line of a file that only grows. What is recorded is never asked again, and what a
wave of prompts may take is counted from the lines before it, so that a command that was killed
goes on to the same answers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import xxhash

from shared.errors import DamagedError
from shared.run.run_dir import write_atomically


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt for the teacher, and how it is to be answered."""

    text: str
    round: int
    purpose: str  # rows, repair, ...
    parents: tuple[str, ...]  # keys of the training rows in it
    max_new_tokens: int
    temperature: float
    seed: int

    def digest(self, teacher: Mapping[str, str]) -> str:
        """What decides the answer, of a teacher with this fingerprint."""
        decides = [self.text, self.max_new_tokens, self.temperature, self.seed, dict(teacher)]
        return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


@dataclass(frozen=True, slots=True)
class Written:
    """What the teacher wrote, and the tokens of the prompt and of the answer."""

    text: str
    read: int
    written: int
    cut: bool  # it came to the limit of tokens before it ended


@dataclass(frozen=True, slots=True)
class Told:
    """An answer on record."""

    digest: str
    ask: Ask
    answer: Written

    @property
    def tokens(self) -> int:
        """What it took of the budget."""
        return self.answer.read + self.answer.written


class Writer(Protocol):
    """A teacher that writes."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Everything that can change a bit of an answer."""
        ...

    def size(self, text: str) -> int:
        """Tokens that it reads of a prompt."""
        ...

    def has_room(self, ask: Ask) -> bool:
        """Whether it reads the prompt and has room for the longest answer."""
        ...

    def write(self, asks: Sequence[Ask]) -> Iterator[Written]:
        """Answers in order, each as soon as it is there."""
        ...


class Log:
    """Every answer so far, on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._told = path, dict[str, Told]()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, torn = text.rpartition("\n")  # torn by a kill
        for number, line in enumerate(whole.split("\n") if whole else (), start=1):
            told = _told(line, f"{path}:{number}")
            self._told[told.digest] = told
        if torn:
            write_atomically(path, whole + "\n" if whole else "")

    def told(self) -> list[Told]:
        """All of them, in the order they were asked."""
        return list(self._told.values())

    def spent(self, before: Sequence[str] = ()) -> int:
        """Tokens of all answers, or of those that stand before the first of these digests."""
        total = 0
        for digest, told in self._told.items():
            if digest in before:
                break
            total += told.tokens
        return total

    def ask(self, asks: Sequence[Ask], writer: Writer, *, budget: int) -> list[Told]:
        """The answers to a wave of asks, or to as many of its first ones as are sure to fit the
        budget; only what is not on record is asked."""
        digests = [ask.digest(writer.fingerprint) for ask in asks]
        left = budget - self.spent(digests)
        affordable = 0
        for ask in asks:
            left -= writer.size(ask.text) + ask.max_new_tokens
            if left < 0:
                break
            affordable += 1
        pairs = list(zip(digests, asks, strict=True))[:affordable]
        left, unknown = budget - self.spent(), dict[str, Ask]()
        for digest, ask in pairs:
            if digest in self._told:
                continue
            left -= writer.size(ask.text) + ask.max_new_tokens
            if left < 0:  # other waves stand after this one: the budget has been another
                break
            unknown[digest] = ask
        for digest, answer in zip(unknown, writer.write(list(unknown.values())), strict=True):
            self._add(Told(digest, unknown[digest], answer))
        known = takewhile(self._told.__contains__, (digest for digest, _ in pairs))
        return [self._told[digest] for digest in known]

    def _add(self, told: Told) -> None:
        self._told[told.digest] = told
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(told)) + "\n")


def _told(line: str, where: str) -> Told:
    try:
        found = json.loads(line)
        ask = Ask(**{**found["ask"], "parents": tuple(found["ask"]["parents"])})
        return Told(found["digest"], ask, Written(**found["answer"]))
    except (ValueError, KeyError, TypeError):
        raise DamagedError(
            f"{where} cannot be read; remove the line, and the teacher is asked again"
        ) from None

"""Where SoftTargets come from: a pool of live teachers or a store on disk."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeVar

from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets

Answer = TypeVar("Answer", covariant=True)


class Reader(Protocol[Answer]):
    """Answers units of rows, whatever it answers with."""

    def submit(self, rows: Rows, question: Question, /) -> None:
        """Ask for a unit; never blocks."""
        ...

    def next(self) -> Answer:
        """The oldest answer not yet taken, waited for."""
        ...


class TargetReader(Protocol):
    """Answers units, in the order in which they were asked."""

    def submit(self, rows: Rows, question: Question, /) -> None:
        """Ask for a unit; never blocks. Answers come back in the order of submission."""
        ...

    def next(self) -> SoftTargets:
        """The oldest answer not yet taken, waited for. Raises TeacherError, naming the rows."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...

    @property
    def stats(self) -> "ReaderStats":
        """Counters since the reader was made."""
        ...


@dataclass(slots=True)
class ReaderStats:
    """What a reader has done so far."""

    units: int = 0
    wait_s: float = 0.0  # time spent blocked in `next`
    wire_bytes: int = 0
    retried_units: int = 0
    cache_hits: int = 0
    teachers: "Mapping[str, ReaderStats]" = field(default_factory=dict)  # where there are several

    @staticmethod
    def summed(teachers: "Mapping[str, ReaderStats]") -> "ReaderStats":
        """What readers of several teachers have done, by teacher and together."""
        each = teachers.values()
        return ReaderStats(
            units=sum(stats.units for stats in each),
            wait_s=sum(stats.wait_s for stats in each),
            wire_bytes=sum(stats.wire_bytes for stats in each),
            retried_units=sum(stats.retried_units for stats in each),
            cache_hits=sum(stats.cache_hits for stats in each),
            teachers=teachers,
        )


def answered(
    reader: Reader[Answer], units: Iterable[Rows], question: Question, *, ahead: int
) -> Iterator[tuple[Rows, Answer]]:
    """Units and their answers, in order. The first `ahead` units are asked about at once, before
    anything is taken, and one more after every answer: so many are under way beyond the unit that
    is worked on. Nobody else may take answers of the reader's to units asked about later before
    these are taken."""
    waiting, asked = iter(units), deque[Rows]()

    def ask(count: int) -> None:
        for rows in islice(waiting, count):
            reader.submit(rows, question)
            asked.append(rows)

    def take() -> Iterator[tuple[Rows, Answer]]:
        while True:
            ask(0 if asked else 1)
            if not asked:
                return
            taken = asked.popleft(), reader.next()
            ask(ahead - len(asked))
            yield taken

    ask(ahead)
    return take()

"""Where SoftTargets come from: a pool of live teachers or a store on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shared.data.rows import Rows
from shared.targets.soft_targets import SoftTargets
from shared.targets.spec import TargetSpec


class TargetReader(Protocol):
    """Answers units, in the order in which they were asked."""

    def submit(self, rows: Rows, spec: TargetSpec, /) -> None:
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

"""Where SoftTargets come from: a pool of live teachers or a store on disk."""

from dataclasses import dataclass
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

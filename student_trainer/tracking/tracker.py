"""What keeps a run's curves: a tracker, behind one protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """One place that shows curves, for one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve, at a step of the run."""
        ...

    def note(self, step: int, text: str) -> None:
        """Say something about the run at a step."""
        ...

    def close(self) -> None:
        """Hand over what is left, and end."""
        ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as trackers know it."""

    id: str  # made once; a resumed run has it again
    name: str
    folder: Path  # the run's own
    runs: Path  # where all runs lie
    options: Mapping[str, Any]  # of the config, as a.b
    steps_done: int  # when this process went on


@dataclass(frozen=True, slots=True)
class Service:
    """A tracker beyond the files of the run folder."""

    title: str
    package: str  # what is imported
    open: Callable[[TrackedRun], Tracker]  # may be slow, and may raise anything
    lacks: Callable[[], str | None]  # what to set before it can be used, in words; None: nothing

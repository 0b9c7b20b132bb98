"""What the start of a run takes: seconds by stage, from a command's first line to the first step.

Stages of different processes overlap, so they add up to more than the total. Moments are of the
clocks of the machines they happen on.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from shared.run.run_dir import write_atomically

# Stage: from one moment to another; where several must have come, from the last of them.
STAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "imports": (("began",), "loaded"),  # the config, and what the driver runs with
    "prepare": (("loaded",), "prepared"),  # hand-shake, rows
    "cluster": (("prepared",), "connected"),  # joined or started
    "teacher": (("connected",), "planned"),  # its service, and what is asked of it
    "workers": (("connected",), "entered"),  # Ray Train, until rank 0 runs our code
    "student": (("entered",), "student"),  # rank 0's imports and loading
    "first_step": (("planned", "student"), "stepped"),  # engine, evaluation before, first units
    "total": (("began",), "stepped"),
}


class StartClock:
    """The moments of one start; pickles with what has happened so far."""

    def __init__(self, moments: Mapping[str, float] | None = None) -> None:
        self.moments = dict(moments or {})

    def mark(self, moment: str) -> None:
        """Note that something has happened, the first time it does."""
        self.moments.setdefault(moment, time.time())

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, of the stages whose moments are known."""
        return {
            stage: round(max(0.0, self.moments[to] - max(self.moments[m] for m in since)), 2)
            for stage, (since, to) in STAGES.items()
            if to in self.moments and all(moment in self.moments for moment in since)
        }

    def sentence(self) -> str:
        """The seconds for people."""
        stages = self.seconds()
        total = stages.pop("total")
        parts = " | ".join(
            f"{stage.replace('_', ' ')} {took:.1f}" for stage, took in stages.items()
        )
        return f"started in {total:.1f} s: {parts}"


def write_start(path: Path, clock: StartClock) -> None:
    """Keep what a start took. Raises StorageError."""
    write_atomically(path, json.dumps(clock.seconds()) + "\n")

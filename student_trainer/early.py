"""What a worker does before it knows its plan: it loads the student, and times the start."""

from pathlib import Path

import torch

from shared.config.run import Config
from shared.errors import TutelageError
from shared.run.start import StartClock, write_start
from student_trainer.accelerator import this_device
from student_trainer.metrics.progress import say
from student_trainer.models.student import Student
from student_trainer.run import Run
from student_trainer.tasks.registry import task_of


class Early:
    """A student loaded ahead; what went wrong is raised to who asks for it, so that all ranks
    hear of it together."""

    def __init__(self, config: Config, clock: StartClock, *, export: Path | None = None) -> None:
        """`export` is an exported folder, whose student is loaded in place of the config's."""
        self._student: Student | None = None
        self._error: TutelageError | None = None
        self.clock, self.is_exported = clock, export is not None
        try:
            self._student = task_of(config).load(config, device=this_device(), export=export)
        except TutelageError as error:
            self._error = error
        clock.mark("student")

    def load(self, config: Config, *, device: torch.device) -> Student:
        """The student; satisfies `LoadStudent`."""
        if self._error is not None:
            raise self._error
        assert self._student is not None, "it is loaded or its error is kept"
        return self._student

    def stepped(self, run: Run) -> None:
        """Say once, after the first step, what the start took."""
        if "stepped" in self.clock.moments or "began" not in self.clock.moments:
            return
        self.clock.mark("stepped")
        if run.ranks.leads and not run.files.start.exists():
            write_start(run.files.start, self.clock)
            say(run, self.clock.sentence())

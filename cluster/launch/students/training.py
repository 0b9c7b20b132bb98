"""One training: Ray Train workers, restarted after a crash, their progress shown while they run."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig, TrainingFailedError

from cluster.launch.students.failures import (
    LOG,
    as_raised,
    first_reason,
    given_up,
    own_error,
    write_traceback,
)
from cluster.launch.students.mailbox import Mailbox
from cluster.launch.students.tracking import Tracking
from cluster.launch.students.worker_group import Meeting, WorkerGroup
from cluster.launch.students.workforce import PACE, Workforce
from cluster.report.outcome import interrupted
from cluster.session.interrupts import on_first_signal
from cluster.session.placement import Demand
from cluster.session.session import IN_RAY
from shared.config.run import Config
from shared.errors import GrowthError, StoppedError
from shared.run import exported, exporter
from shared.run.plan import Assignment
from shared.run.run_dir import RunDir, run_label
from student_trainer.state.checkpoint import last_step, whence
from student_trainer.worker import ERROR, train_worker

TAIL_INTERVAL_S = 0.3
STOP_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Training:
    """What one training of students needs before its plan is known."""

    config: Config
    run_dir: Path
    bundle: dict[str, float]  # Ray resources of one worker
    attempt: Path  # logs/attempt-N of the command
    keeper: str | None = None  # id of an actor that lives as long; None: Ray keeps no state of it
    export: Path | None = (
        None  # whose student is evaluated; None: the config's, from its checkpoint
    )


class Students:
    """The workers of one training; they come up and load the student while its plan is made."""

    def __init__(self, training: Training) -> None:
        self._training, self._files = training, RunDir(training.run_dir)
        self._mailbox, self._told = Mailbox(), self._files.logs / ERROR
        self._force = Workforce(training.config.worker_counts, training.bundle, self._files)
        self._under_way: _Attempt | None = None
        self._restarts = self._failures = self._began_at = 0

    def start(self, beside: Sequence[Demand] = ()) -> None:
        """Let the workers come up and wait for `train`; `beside` are demands that are placed after
        them."""
        self._files.stepping.unlink(missing_ok=True)
        self._force.begin(beside)
        self._attempt(0)

    def train(self, assignment: Assignment) -> int:
        """Let the workers work until the plan is done; return how often a loss restarted them.

        A crash of a worker restarts the group from the last checkpoint, up to
        `student.max_restarts` times; the loss of a node counts where nothing was saved since the
        last start. Workers that end to become more go on likewise. An error that workers raise on
        purpose is final and raised here.
        """
        number = 0
        self._files.stop_request.unlink(missing_ok=True)
        self._mailbox.put(assignment)
        if self._under_way is None:
            self.start()
        exporter.current().set(exported.STUDENT_RESTARTS, 0)
        with on_first_signal(self._ask_to_stop), shown_progress(self._files.progress):
            while self._goes_on(self._under_way.error(self._force.look)):  # type: ignore[union-attr]
                number += 1
                self._attempt(number)
        if self._told.exists():
            raise as_raised(json.loads(self._told.read_text()))
        return self._restarts

    def _attempt(self, number: int) -> None:
        for old in (self._told, self._files.growth_request):
            old.unlink(missing_ok=True)
        self._began_at = last_step(self._files.checkpoints)
        self._under_way = _Attempt(self._training, self._mailbox, self._force, number=number)

    def _goes_on(self, error: TrainingFailedError | None) -> bool:
        """Whether workers that ended are started again, which is said; raises what is final."""
        if error is None and not self._ended_to_grow():
            return False
        if error is not None:
            write_traceback(self._training.attempt, error)
            if (sentence := own_error(error)) is not None:
                raise sentence
        if self._files.stop_request.exists():  # whoever stopped us ended the workers too
            raise StoppedError(interrupted(self._files))
        onwards = whence(self._files.checkpoints)
        print(f"{self._restarted(error) if error else 'the student grows'}, {onwards}", flush=True)
        return True

    def _ended_to_grow(self) -> bool:
        told = json.loads(self._told.read_text()) if self._told.exists() else {}
        return told.get("type") == GrowthError.__name__

    def _restarted(self, error: TrainingFailedError) -> str:
        """Count a loss, and say what was lost. Raises TutelageError where it was one too many."""
        self._restarts += 1
        exporter.current().set(exported.STUDENT_RESTARTS, self._restarts)
        lost = self._force.lost()
        what = lost or f"a student worker died ({first_reason(error)})"
        if lost and last_step(self._files.checkpoints) > self._began_at:
            return f"{what}; restart"
        self._failures += 1
        most = self._training.config.student.max_restarts
        if self._failures > most:
            log = self._training.attempt / LOG
            raise given_up(what, self._failures, log=log, onwards=whence(self._files.checkpoints))
        return f"{what}; restart {self._failures} of {most}"

    def _ask_to_stop(self) -> str | None:
        """Ask the workers to save and end, where they take steps. Called by a signal."""
        if not self._files.stepping.exists():
            return None
        try:
            self._files.stop_request.touch()
        except OSError:
            return None  # no disk to ask by, nor to save to
        return "the step under way is finished and saved; again, and the run ends at once"

    def close(self) -> None:
        """End workers that are still there."""
        if self._under_way is not None:
            self._under_way.stop()
        self._force.close()
        self._mailbox.close()


@contextmanager
def students(training: Training) -> Iterator[Students]:
    """Workers for the length of a `with`."""
    group = Students(training)
    try:
        yield group
    finally:
        group.close()


@contextmanager
def shown_progress(path: Path) -> Iterator[None]:
    """Print the lines that are appended to a file from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    start, done = path.stat().st_size, threading.Event()

    def follow() -> None:
        with path.open() as file:
            file.seek(start)
            while True:
                finishing = done.is_set()
                for line in file:
                    print(line, end="", flush=True)
                if finishing:
                    return
                time.sleep(TAIL_INTERVAL_S)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


class _Attempt:
    """One worker group from start to end, in a thread, so that Ctrl-C reaches who waits."""

    def __init__(
        self, training: Training, mailbox: Mailbox, force: Workforce, *, number: int
    ) -> None:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # errors are raised, too
        config = training.config
        self._error: BaseException | None = None
        shown: Any = [Tracking(training.keeper)] if training.keeper else []
        self._group = WorkerGroup(
            partial(
                train_worker,
                config,
                str(training.run_dir),
                mailbox.take,
                training.export,
            ),
            size=force,
            backend_config=Meeting(),
            scaling_config=ScalingConfig(
                num_workers=config.most_workers,
                use_gpu=config.student.gpus > 0,
                resources_per_worker=training.bundle,
            ),
            # Resuming is our own: a fresh name keeps Ray Train from looking for its checkpoints.
            run_config=RunConfig(
                name=run_label(config, training.run_dir) + f" restart {number}" * bool(number),
                storage_path=str(training.attempt),
                callbacks=shown,
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name=IN_RAY)
        self._thread.start()

    def error(self, look: Callable[[], None]) -> TrainingFailedError | None:
        """Wait until the group has ended, looking now and then, and return the error that ended
        it."""
        while self._thread.is_alive():
            self._thread.join(PACE.look_s)
            look()
        if self._error is not None and not isinstance(self._error, TrainingFailedError):
            raise self._error
        return self._error

    def stop(self) -> None:
        """End the group wherever it is; one that does not come up ends with the command."""
        self._group.stop()
        self._thread.join(STOP_DEADLINE_S)

    def _fit(self) -> None:
        try:
            self._group.fit()
        except BaseException as error:
            self._error = error

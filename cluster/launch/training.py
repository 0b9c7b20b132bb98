"""One training: Ray Train workers, restarted after a crash, their progress shown while they run."""

import json
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError

from cluster.launch.mailbox import Mailbox
from cluster.launch.tracking import Tracking
from cluster.launch.worker_group import Meeting, WorkerGroup
from cluster.report.outcome import interrupted
from cluster.session.interrupts import on_first_signal
from cluster.session.session import IN_RAY
from shared import errors
from shared.config.run import Config
from shared.errors import StoppedError, TutelageError
from shared.run import exported, exporter
from shared.run.plan import Assignment
from shared.run.run_dir import RunDir, run_label
from student_trainer.state.checkpoint import whence
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
        self._under_way: _Attempt | None = None

    def start(self) -> None:
        """Let the workers come up and wait for `train`."""
        for old in (self._told, self._files.stepping):
            old.unlink(missing_ok=True)
        self._under_way = _Attempt(self._training, self._mailbox, restarts=0)

    def train(self, assignment: Assignment) -> int:
        """Let the workers work until the plan is done; return how often they were restarted.

        A crash of a worker restarts the group from the last checkpoint, up to
        `student.max_restarts` times; an error that workers raise on purpose is final and raised
        here.
        """
        restarts, most = 0, self._training.config.student.max_restarts
        self._files.stop_request.unlink(missing_ok=True)
        self._mailbox.put(assignment)
        if self._under_way is None:
            self.start()
        exporter.current().set(exported.STUDENT_RESTARTS, restarts)
        with on_first_signal(self._ask_to_stop), shown_progress(self._files.progress):
            while (error := self._under_way.error()) is not None:  # type: ignore[union-attr]
                _write_traceback(self._training.attempt, error)
                if (sentence := _own_error(error)) is not None:
                    raise sentence
                if self._files.stop_request.exists():  # whoever stopped us ended the workers too
                    raise StoppedError(interrupted(self._files))
                if restarts >= most:
                    raise _given_up(self._training, error)
                restarts += 1
                exporter.current().set(exported.STUDENT_RESTARTS, restarts)
                print(
                    f"a student worker died ({_first_reason(error)}); restart {restarts} of "
                    f"{most}, {whence(self._files.checkpoints)}",
                    flush=True,
                )
                self._under_way = _Attempt(self._training, self._mailbox, restarts=restarts)
        if self._told.exists():
            raise _as_raised(json.loads(self._told.read_text()))
        return restarts

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

    def __init__(self, training: Training, mailbox: Mailbox, *, restarts: int) -> None:
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
            backend_config=Meeting(),
            scaling_config=ScalingConfig(
                num_workers=config.student.workers,
                use_gpu=config.student.gpus > 0,
                resources_per_worker=training.bundle,
            ),
            # Resuming is our own: a fresh name keeps Ray Train from looking for its checkpoints.
            run_config=RunConfig(
                name=run_label(config, training.run_dir) + f" restart {restarts}" * bool(restarts),
                storage_path=str(training.attempt),
                callbacks=shown,
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name=IN_RAY)
        self._thread.start()

    def error(self) -> TrainingFailedError | None:
        """Wait until the group has ended and return the error that ended it."""
        self._thread.join()
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything inside it, worker failures included."""
    yield error
    inner = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    inner += [getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__")]
    for one in inner:
        if isinstance(one, BaseException) and one is not error:
            yield from _causes(one)


def _own_error(error: TrainingFailedError) -> TutelageError | None:
    return next((e for e in _causes(error) if isinstance(e, TutelageError)), None)


def _as_raised(told: dict[str, str]) -> TutelageError:
    """The error that rank 0 wrote down."""
    kind = getattr(errors, told["type"], TutelageError)
    return kind(told["message"])


def _first_reason(error: TrainingFailedError) -> str:
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return (
        ", ".join(f"rank {rank}: {type(e).__name__}" for rank, e in failures.items())
        or type(error).__name__
    )


def _given_up(training: Training, error: TrainingFailedError) -> TutelageError:
    return TutelageError(
        f"the student workers failed {training.config.student.max_restarts + 1} times "
        f"({_first_reason(error)}); the traceback is in {training.attempt / 'error.log'}, the "
        f"same command continues {whence(RunDir(training.run_dir).checkpoints)}"
    )


def _write_traceback(attempt: Path, error: BaseException) -> None:
    with suppress(OSError), (attempt / "error.log").open("a") as file:  # the disk may be full
        file.write("".join(traceback.format_exception(error)) + "\n")

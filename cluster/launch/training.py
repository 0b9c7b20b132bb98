"""One training: Ray Train workers, restarted after a crash, their progress shown while they run."""

import json
import logging
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from shared import errors
from shared.errors import TutelageError
from shared.run.plan import OpenController, OpenRunReader, RunPlan
from shared.run.run_dir import RunDir
from student_trainer.worker import ERROR, train_worker

TAIL_INTERVAL_S = 0.3


@dataclass(frozen=True, slots=True)
class Training:
    """What one training of students needs."""

    plan: RunPlan
    open_reader: OpenRunReader | None
    open_controller: OpenController
    bundle: dict[str, float]  # Ray resources of one worker
    attempt: Path  # logs/attempt-N of the command


def train(training: Training) -> int:
    """Run workers until the plan is done and return how often they were restarted.

    A crash of a worker restarts the group from the last checkpoint, up to `student.max_restarts`
    times; an error that workers raise on purpose is final and raised here.
    """
    config, files = training.plan.config, RunDir(Path(training.plan.run_dir))
    told = files.logs / ERROR
    told.unlink(missing_ok=True)
    restarts = 0
    with shown_progress(files.progress):
        while (error := _attempt(training, restarts)) is not None:
            _write_traceback(training.attempt, error)
            if (sentence := _own_error(error)) is not None:
                raise sentence
            if restarts >= config.student.max_restarts:
                raise _given_up(training, error)
            restarts += 1
            print(
                f"a student worker died ({_first_reason(error)}); restart {restarts} of "
                f"{config.student.max_restarts}, from the last checkpoint",
                flush=True,
            )
    if told.exists():
        raise _as_raised(json.loads(told.read_text()))
    return restarts


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


def _attempt(training: Training, restarts: int) -> TrainingFailedError | None:
    """One worker group from start to end, or the error that ended it."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config = training.plan.config
    loop = partial(
        train_worker,
        training.plan,
        open_reader=training.open_reader,
        open_controller=training.open_controller,
    )
    trainer = TorchTrainer(
        loop,
        torch_config=TorchConfig(backend="nccl" if config.student.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.student.workers,
            use_gpu=config.student.gpus > 0,
            resources_per_worker=training.bundle,
        ),
        # Resuming is our own: a fresh name keeps Ray Train from looking for its checkpoints.
        run_config=RunConfig(
            name=f"workers-{Path(training.plan.run_dir).name}-{restarts}",
            storage_path=str(training.attempt),
            worker_runtime_env={"env_vars": _threads(config.student.cpus)},
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    except SystemExit:  # how Ray Train ends after it has stopped the workers on Ctrl-C
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
    return None


def _threads(cpus: float) -> dict[str, str]:
    """As many threads as whole CPUs were asked for, at least one."""
    return {"OMP_NUM_THREADS": str(max(1, int(cpus)))}


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
        f"the student workers failed {training.plan.config.student.max_restarts + 1} times "
        f"({_first_reason(error)}); the traceback is in {training.attempt / 'error.log'}, the "
        "last good checkpoint stays, and the same command continues from it"
    )


def _write_traceback(attempt: Path, error: BaseException) -> None:
    with suppress(OSError), (attempt / "error.log").open("a") as file:  # the disk may be full
        file.write("".join(traceback.format_exception(error)) + "\n")

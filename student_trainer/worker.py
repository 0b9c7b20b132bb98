"""The shell around the trainer inside Ray Train; everything else here knows nothing of Ray."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import ray.train
import ray.util.metrics

from shared.config.run import Config
from shared.errors import StorageError, TutelageError
from shared.run import exporter
from shared.run.plan import Assignment
from shared.run.run_dir import RunDir, run_label, write_atomically
from shared.run.start import StartClock
from shared.run.threads import use_threads

ERROR = "error.json"


def train_worker(
    config: Config, run_dir: str, take: Callable[[], Assignment], export: Path | None = None
) -> None:
    """What each Ray Train worker runs: the student, or the one in an exported folder, is loaded
    while its assignment is awaited.

    An error that a restart cannot cure is raised on all ranks together; rank 0 writes it to
    `logs/error.json` and all return, so that Ray restarts the group after crashes only.
    """
    clock = StartClock()
    clock.mark("entered")
    use_threads(config.student.cpus)
    from student_trainer.early import Early  # slow, and Ray Train's own processes unpickle this
    from student_trainer.loop import run_plan

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    leads = ray.train.get_context().get_world_rank() == 0
    files = RunDir(Path(run_dir))
    path = files.logs / ERROR
    if leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        files.stepping.unlink(missing_ok=True)
    exporter.start(ray.util.metrics, run=run_label(config, files.path))
    try:
        early = Early(config, clock, export=export)
        given = take()
        clock.moments |= given.clock.moments
        work = given.work or run_plan
        work(
            given.plan,
            given.open_reader,
            given.open_controller,
            early=early,
            open_generator=given.open_generator,
            open_teachers=given.open_teachers,
            open_modules=given.open_modules,
        )
    except TutelageError as error:
        if leads:
            _leave(error, path)
    finally:
        exporter.stop()


def _leave(error: TutelageError, path: Path) -> None:
    """Write an error where the driver looks for it, or raise it, so that Ray carries it."""
    described = {
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
    }
    try:
        write_atomically(path, json.dumps(described))
    except StorageError:
        raise error from None

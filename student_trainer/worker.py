"""The shell around the trainer inside Ray Train; everything else here knows nothing of Ray."""

import json
import logging
from pathlib import Path

import ray.train

from shared.errors import StorageError, TutelageError
from shared.run.plan import OpenController, OpenRunReader, RunPlan
from shared.run.run_dir import RunDir, write_atomically

ERROR = "error.json"


def train_worker(
    plan: RunPlan, open_reader: OpenRunReader | None, open_controller: OpenController
) -> None:
    """What each Ray Train worker runs.

    An error that a restart cannot cure is raised on all ranks together; rank 0 writes it to
    `logs/error.json` and all return, so that Ray restarts the group after crashes only.
    """
    from student_trainer.loop import run_plan  # slow, and Ray Train's own processes unpickle this

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    leads = ray.train.get_context().get_world_rank() == 0
    path = RunDir(Path(plan.run_dir)).logs / ERROR
    if leads:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        run_plan(plan, open_reader, open_controller)
    except TutelageError as error:
        if leads:
            described = {
                "type": type(error).__name__,
                "message": str(error),
                "exit_code": error.exit_code,
            }
            try:
                write_atomically(path, json.dumps(described))
            except StorageError:  # then Ray carries it
                raise error from None

"""A run's checkpoints: written now and then, and gone on from after a restart."""

import logging
from pathlib import Path
from typing import Any

from shared.errors import TutelageError
from student_trainer.models.census import census
from student_trainer.run import Run
from student_trainer.state.checkpoint import (
    CHECKPOINT_FORMAT,
    latest_checkpoint,
    read_state,
    refuse_changes,
    step_of,
)
from student_trainer.state.shards import load_shards, write_checkpoint
from student_trainer.state.stateful import refuse_other_states, restore_states, states_of

log = logging.getLogger(__name__)


def restore(run: Run) -> int:
    """Load the newest whole checkpoint; returns the updates done, 0 for a fresh run.

    Raises CheckpointError where the run's shape has changed since, or its stateful parts have.
    """
    checkpoint = _latest(run)
    if checkpoint is None:
        return 0
    found = read_state(checkpoint)
    refuse_changes(checkpoint, found=found["facts"], asked=_facts(run))
    refuse_other_states(checkpoint.name, found=found, parts=run.stateful)
    load_shards(run.engine, checkpoint)
    restore_states(run.stateful, found)
    if run.ranks.leads:
        log.info("resuming from %s", checkpoint.name)
    return step_of(checkpoint)


def save(run: Run, step: int) -> None:
    """Write the checkpoint of `step`, unless it is there; the weight log is as far by then."""
    run.weight_log.learn_decisions(before=step)
    state = {
        "step": step,
        "weight_entries": run.weight_log.num_entries,
        **states_of(run.stateful),
        "facts": _facts(run),
        "frozen_weights": run.frozen and run.frozen.facts(),
    }
    write_checkpoint(
        run.engine,
        run.student,
        folder=run.files.checkpoints,
        step=step,
        state=state,
        keep=run.config.checkpoints.keep,
        ranks=run.ranks,
    )


def _latest(run: Run) -> Path | None:
    """Rank 0 looks for the checkpoint and the others follow, whatever they see themselves."""
    found, error = None, None
    if run.ranks.leads:
        try:
            found = latest_checkpoint(run.files.checkpoints)
        except TutelageError as failure:
            error = failure
    run.ranks.agree(error)
    return run.ranks.from_leader(found)


def _facts(run: Run) -> dict[str, Any]:
    """What a checkpoint can only be resumed with."""
    student, batch = run.config.student, run.config.batch
    facts = {
        "checkpoint format": CHECKPOINT_FORMAT,
        "student.workers": run.ranks.world_size,
        "student.zero": student.zero,
        "student.dtype": student.dtype,
        "student.train": student.train.model_dump(mode="json"),
        "seed": run.config.seed,
        "batch.rows_per_step": batch.rows_per_step,
        "batch.micro_batch": batch.micro_batch,
    }
    base = {"the frozen weights": run.frozen.digest} if run.frozen else {}
    if run.frozen is None and (counted := census(run.student)).frozen:
        base = {"the number of weights that train": counted.trained}
    return facts | base | run.source.facts()

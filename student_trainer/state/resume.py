"""A run's checkpoints: written now and then, and gone on from after a restart."""

import logging
from pathlib import Path
from typing import Any

from shared.errors import TutelageError
from shared.prompts.row_prompts import RowOpenings
from student_trainer.models.census import census
from student_trainer.run import Run
from student_trainer.state.checkpoint import (
    CHECKPOINT_FORMAT,
    latest_checkpoint,
    read_state,
    refuse_changes,
    refuse_fewer_steps,
    step_of,
)
from student_trainer.state.resharding import load_resharded
from student_trainer.state.shards import TAG, load_shards, write_checkpoint
from student_trainer.state.stateful import refuse_other_states, restore_states, states_of

log = logging.getLogger(__name__)
PLACED = "the frozen weights"  # as ranks hold them, which depends on how they are cut
BASE = "the base of the adapters"


def restore(run: Run) -> int:
    """Load the newest whole checkpoint; returns the updates done, 0 for a fresh run.

    Raises CheckpointError where the run's shape has changed since, or its stateful parts have.
    """
    checkpoint = _latest(run)
    if checkpoint is None:
        return 0
    found = read_state(checkpoint)
    written, cut = found["facts"], _cut(run)
    is_cut_alike = cut.items() <= written.items()
    refuse_fewer_steps(run.files.checkpoints, steps=run.config.steps)
    asked = _facts(run)
    if not is_cut_alike:
        asked.pop(PLACED, None)
    if BASE not in written:
        asked.pop(BASE, None)
    refuse_changes(checkpoint, found=written, asked=asked)
    refuse_other_states(checkpoint.name, found=found, parts=run.stateful)
    if is_cut_alike:
        load_shards(run.engine, checkpoint)
    else:
        load_resharded(run.engine, checkpoint / TAG, zero=written["student.zero"])
    restore_states(run.stateful, found)
    if run.ranks.leads:
        before = ", ".join(f"{name}={written[name]}" for name in cut)
        resharded = f", which was written with {before}" * (not is_cut_alike)
        log.info("resuming from %s%s", checkpoint.name, resharded)
    return step_of(checkpoint)


def save(run: Run, step: int) -> None:
    """Write the checkpoint of `step`, unless it is there; the weight log is as far by then, and
    what is drawn for later steps lies on disk."""
    run.settle()
    run.weight_log.learn_decisions(before=step)
    state = {
        "step": step,
        "weight_entries": run.weight_log.num_entries,
        **states_of(run.stateful),
        "facts": _facts(run) | _cut(run),
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


def _cut(run: Run) -> dict[str, int]:
    """What decides which part of weights and optimiser a rank holds."""
    return {"student.workers": run.ranks.world_size, "student.zero": run.config.student.zero}


def _facts(run: Run) -> dict[str, Any]:
    """What a checkpoint can only be resumed with."""
    student, batch = run.config.student, run.config.batch
    facts = {
        "checkpoint format": CHECKPOINT_FORMAT,
        "student.dtype": student.dtype,
        "student.train": student.train.model_dump(mode="json"),
        "seed": run.config.seed,
        "batch.rows_per_step": batch.rows_per_step,
    }
    if (modules := run.config.modules) is not None:
        facts["the teacher's modules"] = modules.model_dump(mode="json")
    if (followed := run.config.followed) is not None:
        facts["the student that teaches"] = followed.model_dump(mode="json")
    if run.config.weighting.weighs:
        facts["weighting"] = run.config.weighting.model_dump(mode="json")
    openings = run.plan.openings.items()
    if shown := {name: one.digest for name, one in openings if isinstance(one, RowOpenings)}:
        facts["what the teacher is shown with each row"] = shown
    base: dict[str, Any] = {}
    if run.frozen is not None:
        base = {PLACED: run.frozen.digest, BASE: run.base}
    elif (counted := census(run.student)).frozen:
        base = {"the number of weights that train": counted.trained}
    return facts | base | run.source.facts()

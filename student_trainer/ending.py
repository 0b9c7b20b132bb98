"""Where a run goes on and where it ends: after its last step, with the export, or when asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from shared.errors import GrowthError, StoppedError, StorageError, TutelageError
from shared.mixture.weight_log import read_log
from shared.run.metrics import drop_metrics_after
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from student_trainer.evaluation.evaluations import read_evaluations
from student_trainer.metrics.progress import say
from student_trainer.models.frozen import refuse_changed
from student_trainer.run import Run
from student_trainer.state.checkpoint import (
    all_checkpoints,
    latest_checkpoint,
    step_of,
)
from student_trainer.state.export import Reloader, export_checkpoint, exported_step
from student_trainer.state.resume import save
from student_trainer.tracking.trackers import open_trackers

AHEAD_S = 20.0  # what its imports take where many share a core


def is_finished(plan: RunPlan) -> bool:
    """Whether nothing is left to do: evaluated, exported, and the last step is saved."""
    files = RunDir(Path(plan.run_dir))
    return (
        plan.mode == "train"
        and exported_step(files.export) == _end(plan)
        and "after" in read_evaluations(files.path)
    )


def go_on(run: Run, step: int) -> None:
    """Say from which step a run that has begun before goes on, and drop the metrics of later
    ones, which it takes again; its curves go on there, too. Raises StorageError."""
    error = None
    if run.ranks.leads and (step or run.files.metrics.exists()):
        try:
            drop_metrics_after(run.files.metrics, step)
            begun = f"from step {step} of {run.config.steps}" if step else "from the start"
            say(run, f"going on {begun}")
        except StorageError as failure:
            error = failure
    run.ranks.agree(error)
    if run.ranks.leads:
        tell = partial(say, run)
        run.trackers = open_trackers(run.files, run.config, step=step, tell=tell)


@contextmanager
def stepping(run: Run) -> Iterator[None]:
    """Let others see, for the length of a `with`, that this run takes steps and can be asked to
    stop after one."""
    if run.ranks.leads:
        run.files.stepping.touch()
    try:
        yield
    finally:
        if run.ranks.leads:
            run.files.stepping.unlink(missing_ok=True)


def stop_if_asked(run: Run, step: int) -> None:
    """Save and raise StoppedError on all ranks where rank 0 sees that somebody asks for it."""
    asked = run.ranks.leads and run.files.stop_request.exists()
    if not run.ranks.sum(np.array([asked]))[0]:
        return
    last = run.ranks.from_leader(all_checkpoints(run.files.checkpoints)[-1:])
    if step and [step] != [step_of(checkpoint) for checkpoint in last]:
        save(run, step)
    if run.ranks.leads:
        run.files.stop_request.unlink(missing_ok=True)
    raise StoppedError(
        f"Stopped after step {step} of {run.config.steps}, which is saved; the same command "
        "continues from there."
        if step
        else "Stopped before the first step; the same command starts again."
    )


def end_to_grow(run: Run, step: int) -> None:
    """Raise GrowthError on all ranks where `step`, just saved, shall be gone on from by more of
    them; rank 0 looks."""
    asked = run.ranks.leads and run.files.growth_request.exists()
    if not run.is_over(step) and run.ranks.sum(np.array([asked]))[0]:
        raise GrowthError(f"ended after step {step}, to go on with more workers")


def say_stopped(run: Run, step: int) -> None:
    """Tell people where training ended before its last step."""
    if run.ranks.leads and step < run.config.steps:
        say(
            run,
            f"stopped after step {step}/{run.config.steps}: the student's perplexity was at "
            f"most {run.config.stop_ratio:g} times the teacher's in every domain",
        )


def foresee(run: Run, step: int, *, seconds: float) -> None:
    """Start the process that will load the export, where the run ends soon at so many seconds a
    step and its export is not there yet."""
    steps = run.config.steps
    is_soon = run.ranks.leads and (steps - step) * seconds < AHEAD_S
    if is_soon and run.reloader is None and exported_step(run.files.export) != steps:
        run.reloader = Reloader()


def export(run: Run, step: int) -> None:
    """Publish the student after its last step as a plain folder; rank 0 works, errors reach
    all.

    Raises FrozenWeightsError where training changed more than adapters.
    """
    refuse_changed(run.student, run.frozen, run.ranks)
    error = None
    if run.ranks.leads and exported_step(run.files.export) != step:
        checkpoint = latest_checkpoint(run.files.checkpoints)
        assert checkpoint is not None, "the last step was saved"
        try:
            export_checkpoint(
                checkpoint,
                config=run.config,
                run_dir=run.files,
                kind=run.task.model,
                reloader=run.reloader,
            )
        except TutelageError as failure:
            error = failure
    run.ranks.agree(error)


def _end(plan: RunPlan) -> int:
    """Steps of a run, as its weight log has it."""
    log_path = RunDir(Path(plan.run_dir)).weight_log
    return read_log(log_path, plan.config.domains).end(plan.config.steps)

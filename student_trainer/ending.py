"""The end of a run: whether it was reached, what is said of it, and the export."""

from pathlib import Path

from shared.errors import TutelageError
from shared.mixture.weight_log import read_log
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from student_trainer.evaluations import read_evaluations
from student_trainer.models.frozen import refuse_changed
from student_trainer.progress import say
from student_trainer.run import Run
from student_trainer.state.checkpoint import latest_checkpoint
from student_trainer.state.export import Reloader, export_checkpoint, exported_step

AHEAD_S = 20.0  # what its imports take where many share a core


def is_finished(plan: RunPlan) -> bool:
    """Whether nothing is left to do: evaluated, exported, and the last step is saved."""
    files = RunDir(Path(plan.run_dir))
    return (
        plan.mode == "train"
        and exported_step(files.export) == _end(plan)
        and "after" in read_evaluations(files.path)
    )


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
    step."""
    left = run.config.steps - step
    if run.ranks.leads and run.reloader is None and left * seconds < AHEAD_S:
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

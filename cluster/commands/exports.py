"""`tutelage export`: a run's student as a folder for others to load."""

import shutil
from pathlib import Path

from cluster.commands.runs import config_of
from shared.config.run import Config
from shared.errors import CheckpointError, ConfigError, reason_of
from shared.run.run_dir import RunDir


def export(run: Path, *, to: Path | None = None, merge: bool = False) -> None:
    """The newest whole checkpoint, loaded again and compared first; `merge` makes one model of an
    adapted student."""
    run_dir = RunDir(run.absolute())
    config = config_of(run_dir)
    if to is not None:
        _refuse_unwritable(to)
    from student_trainer.state.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run_dir.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet; train first, with `tutelage run`")
    write = _merged if merge else _exported
    write(checkpoint, config, run_dir, to)


def _exported(checkpoint: Path, config: Config, run_dir: RunDir, to: Path | None) -> None:
    from student_trainer.state.checkpoint import step_of
    from student_trainer.state.export import newest_export
    from student_trainer.tasks.registry import task_of

    newest_export(run_dir, config, task_of(config).model)
    if to is not None:
        _copied(run_dir.export, to)
    print(f"step {step_of(checkpoint)} is in {to or run_dir.export}")


def _merged(checkpoint: Path, config: Config, run_dir: RunDir, to: Path | None) -> None:
    from student_trainer import accelerator  # noqa: F401  # before what it keeps quiet
    from student_trainer.state.checkpoint import step_of
    from student_trainer.state.export import exported_step
    from student_trainer.state.merge import merge_checkpoint, refuse_whole
    from student_trainer.tasks.registry import task_of

    refuse_whole(config)
    if exported_step(run_dir.merged) != step_of(checkpoint):
        found = merge_checkpoint(
            checkpoint, config=config, run_dir=run_dir, kind=task_of(config).model
        )
        print(f"logits of base and adapter and of the merged weights differ by {found:.1e} at most")
    if to is not None:
        _copied(run_dir.merged, to)
    print(f"step {step_of(checkpoint)}, merged into its base, is in {to or run_dir.merged}")


def _refuse_unwritable(to: Path) -> None:
    """Refuse a place for an export before any work. Raises ConfigError."""
    try:
        if to.exists():
            raise ConfigError(f"{to} exists already; name a new folder with --to")
        to.mkdir(parents=True)
        to.rmdir()
    except OSError as error:
        raise ConfigError(
            f"--to is {to}, which cannot be made: {reason_of(error)}; name a folder that you may "
            "write to"
        ) from None


def _copied(folder: Path, to: Path) -> None:
    """Copy an export, whole or not at all. Raises StorageError."""
    from student_trainer.state.export import publishing

    with publishing(to) as draft:
        shutil.copytree(folder, draft)

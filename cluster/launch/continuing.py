"""Runs that go on: whether there is anything left to do, and what changes."""

from shared.config.models.student import Elastic
from shared.config.run import Config
from shared.errors import CheckpointError
from shared.mixture.weight_log import read_log
from shared.run.changes import changed_options, differing_options
from shared.run.run_dir import RunDir, read_written
from student_trainer.schedule import respread
from student_trainer.state.checkpoint import last_step

SAID = ("steps", "batch.micro_batch", "student")  # the rest changes nothing that one would look for


def changes_in_words(run_dir: RunDir, config: Config) -> list[str]:
    """Lines on what a run that has begun goes on with in place of what it had; call it before the
    run takes the config. None where the config is refused."""
    if not run_dir.config.exists() or not run_dir.has_begun:
        return []
    before = run_dir.recorded_config()
    if differing_options(before, config):
        return []
    changed = [
        f"{name}={now} (was {was})"
        for name, (was, now) in changed_options(before, config).items()
        if any(name == said or name.startswith(f"{said}.") for said in SAID)
        and not name.startswith("student.workers")
    ]
    was, now = before.student.workers, config.student.workers
    if was != now:
        changed.append(f"student.workers={_number(now)} (was {_number(was)})")
    lines = [f"going on with {', '.join(changed)}"] if changed else []
    if config.steps != before.steps:
        step = last_step(run_dir.checkpoints)
        steps = {"before": before.steps, "after": config.steps}
        lines.append(respread(config.optimiser, step=step, **steps))
    return lines


def _number(workers: int | Elastic) -> str:
    return f"{workers.min} to {workers.max}" if isinstance(workers, Elastic) else str(workers)


def has_ended(run_dir: RunDir, config: Config) -> bool:
    """Whether a run is finished with all steps that are asked for, of which there may be more than
    before."""
    if not run_dir.finished:
        return False
    try:
        end = read_log(run_dir.weight_log, config.domains).end(config.steps)
    except CheckpointError:  # of other domains, which are refused
        return False
    return read_written(run_dir.summary).get("steps", 0) >= end

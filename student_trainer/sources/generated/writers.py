"""Who writes for a run: its own ranks, or copies of the student that a service hosts."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from shared.errors import ConfigError
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.generation import OpenGenerator, RemoteGenerator
from shared.targets.weights import WeightFiles
from student_trainer.accelerator import this_device
from student_trainer.models.student import Student
from student_trainer.models.writing import OwnRanks, Writer
from student_trainer.ranks import Ranks
from student_trainer.sources.generated.pushing import Pusher
from student_trainer.state.versions import Versions


def open_writer(
    plan: RunPlan,
    open_generator: OpenGenerator | None,
    *,
    student: Student,
    engine: Any,
    ranks: Ranks,
    model: nn.Module | None,
) -> Writer:
    """The writer that a config asks for; `model` is what this rank writes with, None where copies
    of the student write. Raises ConfigError where nothing can write."""
    config = plan.config
    if open_generator is None:
        raise ConfigError(config.source.unwritten)
    generator = open_generator(
        model,
        device=this_device(),
        dtype=config.student.dtype,
        batch_rows=config.source.batch_rows,
    )
    if model is not None:
        return OwnRanks(generator, model, student.saved, engine)
    run_dir = RunDir(Path(plan.run_dir))
    return Pusher(
        generator=cast(RemoteGenerator, generator),  # copies are in other processes
        versions=Versions(
            student,
            engine,
            ranks,
            run_dir,
            WeightFiles(run_dir.weights),
            config.student.dtype,
            "the student's copies",
        ),
        lag=config.rollout_lag,
    )

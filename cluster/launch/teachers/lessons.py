"""How a run's lessons reach the replicas of the teacher whose modules learn."""

from functools import partial
from typing import TYPE_CHECKING

from shared.run.run_dir import append_progress
from shared.targets.lessons import ModuleTrainer, OpenModules

if TYPE_CHECKING:
    from cluster.planning.preparation import Launch
    from shared.run.plan import RunPlan


def modules_of(launch: "Launch", plan: "RunPlan") -> OpenModules | None:
    """A way to the replicas of the teacher whose modules learn; None where none do."""
    if plan.config.modules is None:
        return None
    from cluster.launch.teachers.serving import (  # slow, and workers import this
        own_services,
        pool_settings,
    )

    (service,) = own_services(launch).values()
    client, teacher = str(launch.run_dir.path), plan.teacher or {}
    settings = pool_settings(launch.config, service, teacher=teacher, client=client, own=True)
    return partial(_open_modules, settings | {"say": partial(append_progress, launch.run_dir)})


def _open_modules(settings: dict) -> ModuleTrainer:
    from teacher_service.service.pool import LessonPool

    return LessonPool(0, **settings)

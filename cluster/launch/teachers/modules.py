"""Modules of a teacher that learn in its replicas beside a run's student; who may not have any."""

from functools import partial
from typing import TYPE_CHECKING

from cluster.planning.tasks.classes import refuse_without_run
from shared.config.models.modules import TrainedModules, unserved
from shared.config.run import Config
from shared.errors import ConfigError
from teacher_service.engine.description import Engine, MakeEngine

if TYPE_CHECKING:
    from cluster.planning.preparation import Launch


def with_modules(launch: "Launch", make_engine: MakeEngine) -> MakeEngine:
    """What makes the engine of a run's own teacher, with modules on it where some learn."""
    config = launch.config
    if config.modules is None:
        return make_engine
    folder = str(launch.run_dir.modules)
    return partial(_on, make_engine, config.modules, seed=config.seed, folder=folder)


def _on(make_engine: MakeEngine, asked: TrainedModules, *, seed: int, folder: str) -> Engine:
    """An engine with modules; imported there, so that a driver needs no torch."""
    from pathlib import Path

    from shared.targets.weights import ModuleFiles
    from teacher_service.engine.learning import LearningEngine

    return LearningEngine(make_engine(), asked, seed=seed, files=ModuleFiles(Path(folder)))


def refuse_shared_service(config: Config) -> None:
    """Raise ConfigError where a teacher is made of its run's rows, or would change in a service
    that others may ask."""
    refuse_without_run(config, "a service that outlives a run")
    if config.modules is not None or config.followed is not None:
        raise ConfigError(unserved(config.teachers))

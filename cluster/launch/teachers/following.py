"""A run's own teacher that is its student some steps ago: the engine of its replicas."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config.models.student import LoRATraining
from shared.config.run import Config
from teacher_service.engine.description import Engine, MakeEngine

if TYPE_CHECKING:
    from cluster.planning.preparation import Launch


def following(launch: "Launch", make_engine: MakeEngine) -> MakeEngine:
    """What makes the engine of a run's own teacher, with the student's weights where it follows
    it."""
    if launch.config.followed is None:
        return make_engine
    return partial(follow, make_engine, launch.config, folder=str(launch.run_dir.followed))


def follow(make_engine: MakeEngine, config: Config, *, folder: str) -> Engine:
    """An engine that has the weights of versions out of a folder, laid out as the student has them;
    imported there, so that a driver needs no torch. Raises ConfigError."""
    from shared.targets.weights import WeightFiles
    from teacher_service.engine.following import FollowingEngine

    engine: Any = make_engine()
    return FollowingEngine(engine, _adapted(engine, config), WeightFiles(Path(folder)))


def _adapted(engine: Any, config: Config) -> Any | None:
    """The student's adapters on the engine's model; None where every weight trains."""
    if not isinstance(config.student.train, LoRATraining):
        return None
    from student_trainer.models.adapters import adapt
    from student_trainer.models.probing import take_apart
    from student_trainer.tasks.causal_lm import CAUSAL_LM

    parts = take_apart(engine.model, name=config.student.model)
    kind, seed = CAUSAL_LM.model, config.seed
    adapted = adapt(
        engine.model, config.student, kind, decoder=parts.decoder, head=parts.head, seed=seed
    )
    return adapted.eval()

"""A process in an engine's own environment.

It is an actor that Ray starts with that environment's Python (`py_executable`), in the placement
group of its replica. It is sent one class by value and finds nothing else of ours.
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shared.config.teachers import Teacher
from shared.errors import TeacherError
from teacher_service.engine import vllm_worker
from teacher_service.engine.environment import refuse_environment

log = logging.getLogger(__name__)


class Worker:
    """The process of an engine, in an environment of its own. One that dies ends the process that
    asks it, which Ray starts again with another."""

    def __init__(self, teacher: Teacher) -> None:
        """Raises ConfigError where the environment is none for it."""
        assert teacher.python is not None, "the config names one"
        refuse_environment(teacher.python)
        # by value: the other environment has no module of ours
        cloudpickle.register_pickle_by_value(vllm_worker)
        options: dict[str, Any] = {
            "num_cpus": teacher.cpus,
            "num_gpus": teacher.gpus,
            "max_restarts": 0,
            "runtime_env": {
                "py_executable": str(Path(teacher.python).expanduser()),
                "env_vars": _variables(teacher),
            },
        }
        if (group := ray.util.get_current_placement_group()) is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, 0)
        self._actor = ray.remote(vllm_worker.VllmWorker).options(**options).remote()

    def __call__(self, method: str, *args: Any) -> Any:
        """What a method of it gives. Raises TeacherError with what it raises."""
        try:
            return ray.get(getattr(self._actor, method).remote(*args))
        except RayTaskError as error:
            raise TeacherError(str(error.cause)) from None
        except RayActorError as error:
            log.error("the engine's process died: %s", error)
            if _in_replica():
                os._exit(1)
            raise TeacherError("the engine's process died; start it again") from None


def load_vllm(teacher: Teacher, *, context: int | None = None) -> Any:
    """The engine of a teacher in vLLM. Raises ConfigError."""
    from teacher_service.engine.vllm_engine import VllmEngine

    return VllmEngine(Worker(teacher), teacher, context=context)


def _variables(teacher: Teacher) -> dict[str, str]:
    """What vLLM reads from its environment."""
    found = {
        "PYTHONPATH": "",
        "PYTHONNOUSERSITE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose end is seen
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the token that is written after a whole row
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not teacher.gpus:
        found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return found


def _in_replica() -> bool:
    return ray.get_runtime_context().get_actor_id() is not None

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
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shared.config.models.engines import ANSWERS_WITHIN_S
from shared.config.models.teachers import Teacher
from shared.errors import TeacherError, reason_of
from teacher_service.engine.vllm import worker as vllm_worker
from teacher_service.engine.vllm.environment import refuse_environment

log = logging.getLogger(__name__)

DEADLINE_S = ANSWERS_WITHIN_S  # of one answer; who asks gives up before, as the config has it


class Worker:
    """The process of an engine, in an environment of its own. One that dies, or does not answer,
    ends the process that asks it, which Ray starts again with another."""

    def __init__(self, teacher: Teacher, *, section: str) -> None:
        """`section` is where the config has it. Raises ConfigError where the environment is none
        for it."""
        assert teacher.python is not None, "the config names one"
        refuse_environment(teacher.python, section=section)
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
        self._actor: Any = ray.remote(vllm_worker.VllmWorker).options(**options).remote()

    def __call__(self, method: str, *args: Any) -> Any:
        """What a method of it gives. Raises TeacherError with what it raises."""
        try:
            return ray.get(getattr(self._actor, method).remote(*args), timeout=DEADLINE_S)
        except RayTaskError as error:
            raise TeacherError(str(error.cause)) from None
        except RayActorError as error:
            raise _lost(f"died ({reason_of(error)})") from None
        except GetTimeoutError:
            ray.kill(self._actor)
            raise _lost(f"did not answer within {DEADLINE_S:g} s") from None


def load_vllm(
    teacher: Teacher,
    *,
    context: int | None = None,
    section: str = "teachers.NAME",
    adapters: dict[str, Any] | None = None,
) -> Any:
    """The engine of a model in vLLM, with arguments as `VllmEngine` has them. Raises
    ConfigError."""
    from teacher_service.engine.vllm.engine import VllmEngine

    worker = Worker(teacher, section=section)
    return VllmEngine(worker, teacher, context=context, section=section, adapters=adapters)


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


def _lost(how: str) -> TeacherError:
    """The sentence about an engine's process that answers nothing any more; ends a replica."""
    if ray.get_runtime_context().get_actor_id() is not None:
        log.error("the engine's process %s", how)
        os._exit(1)
    return TeacherError(f"the engine's process {how}; start it again")

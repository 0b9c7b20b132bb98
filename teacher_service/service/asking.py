"""What is asked of a service's registry and replicas, with Ray's errors as sentences."""

from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from shared.errors import TeacherError, TutelageError
from teacher_service.service.replicas.naming import REGISTRY, Request, find_actor

ANSWER_S = 30.0


def request_of(service: str) -> Request | None:
    """What a service was started with; None where it has no registry, or a dead one."""
    registry = find_actor(service, REGISTRY)
    if registry is None:
        return None
    try:
        return answer(registry.request.remote(), "the registry")
    except TeacherError:
        return None


def tell(service: str, what: str, user: str) -> bool:
    """Tell the registry; whether it is there: one that is too busy to answer is."""
    registry = find_actor(service, REGISTRY)
    if registry is None:
        return False
    try:
        ray.get(getattr(registry, what).remote(user), timeout=ANSWER_S)
    except (GetTimeoutError, ActorUnavailableError):
        return True
    except RayError:
        return False
    return True


def answer(ref: Any, who: str, deadline_s: float = ANSWER_S) -> Any:
    """The actor's answer, its own errors as they were raised, Ray's as sentences."""
    try:
        return ray.get(ref, timeout=deadline_s)
    except RayTaskError as error:
        if isinstance(error.cause, TutelageError):
            raise error.cause from None
        raise TeacherError(f"{who} failed: {error.cause}") from error
    except GetTimeoutError as error:
        raise TeacherError(f"{who} did not answer within {deadline_s:g} s") from error
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TeacherError(f"{who} died: {reason}") from error

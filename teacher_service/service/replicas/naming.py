"""Names of a service's actors in Ray, and what it was started with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray

from shared.config.models.teachers import Autoscaling, Teacher
from teacher_service.service.scaling.policy import Pace

REGISTRY = "tutelage-registry"
REPLICA = "replica-"  # and a number, after the service's name
RANK = "rank-"  # and a number, after the name of the replica that it is part of

Role = Literal["teacher", "student", "rollouts"]  # whose place in the cluster replicas take


@dataclass(frozen=True, slots=True)
class Request:
    """What a service was started with, enough to add replicas to it later."""

    teacher: Teacher
    make_engine: bytes  # pickled, opaque to the registry
    runtime_env: dict[str, Any]
    detached: bool
    job: str  # of the driver that owns what is not detached
    pace: Pace  # of its scaling, where it scales itself
    role: Role = "teacher"

    def actor_options(self, service: str, name: str) -> dict[str, Any]:
        """Ray's options of an actor that is one process of a replica, but for its place."""
        return {
            "name": name,
            "namespace": service,
            "lifetime": lifetime_of(self.detached),
            "num_cpus": 0 if self.teacher.apart else self.teacher.rank_cpus,
            "num_gpus": 0 if self.teacher.apart else self.teacher.rank_gpus,
            "runtime_env": self.runtime_env,
        }

    def with_replicas(self, replicas: int | Autoscaling) -> "Request":
        """The same for another number of replicas."""
        return replace(self, teacher=self.teacher.model_copy(update={"replicas": replicas}))

    def same_teacher(self, teacher: Teacher) -> bool:
        """Whether the other config asks for the same answers from the same hardware."""
        return self.teacher.model_copy(update={"replicas": teacher.replicas}) == teacher


def replica_name(service: str, index: int) -> str:
    """Name of a replica's actor, as the dashboard lists it."""
    return f"{service}/{REPLICA}{index}"


def rank_name(replica: str, rank: int) -> str:
    """Name of the actor of a further rank of a replica."""
    return f"{replica}/{RANK}{rank}"


def service_of(replica: str) -> str:
    """Name of the service of a replica."""
    return replica.rpartition("/")[0]


def short_name(replica: str) -> str:
    """Name of a replica in its service."""
    return replica.rpartition("/")[2]


def index_of(replica: str) -> int:
    """Number of a replica in its service."""
    return int(short_name(replica).removeprefix(REPLICA))


def is_replica(actor: Mapping[str, str]) -> bool:
    """Whether a named actor, as Ray lists it, is a replica."""
    return is_part(actor) and f"/{RANK}" not in actor["name"].removeprefix(actor["namespace"])


def is_part(actor: Mapping[str, str]) -> bool:
    """Whether a named actor, as Ray lists it, is a replica or a further rank of one."""
    return actor["name"].startswith(f"{actor['namespace']}/{REPLICA}")


def replica_names(service: str) -> list[str]:
    """Names of the replicas that exist in the cluster, registered or not, oldest first."""
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    found = [a["name"] for a in named if a["namespace"] == service and is_replica(a)]
    return sorted(found, key=index_of)


def find_actor(service: str, name: str) -> Any:
    """A service's actor, or None where there is none of this name."""
    try:
        return ray.get_actor(name, namespace=service)
    except ValueError:
        return None


def lifetime_of(detached: bool) -> str | None:
    """What Ray calls the lifetime of a service's actors and groups."""
    return "detached" if detached else None

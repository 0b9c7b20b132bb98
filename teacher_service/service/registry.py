"""TeacherRegistry: the versioned list of a service's replicas. Carries no payload.

One zero-CPU actor per service, in a namespace named like the service. Clients long-poll it, so
they learn of new, dead and draining replicas while they train.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import ray.util.metrics
from ray.exceptions import RayError

from shared.config.run import Teacher
from shared.run import exported, exporter
from teacher_service.service.actor import Health

REGISTRY = "tutelage-registry"
REPLICA = "replica-"  # and a number, after the service's name
USE_S = 15.0  # a user that has not been heard of for so long is dead
POLL_S = 0.5
HEALTH_DEADLINE_S = 10.0

Role = Literal["teacher", "student"]  # whose place in the cluster replicas take
State = Literal["starting", "alive", "failed", "down", "draining"]


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as the registry last saw it."""

    name: str
    state: State = "starting"
    restarts: int = 0
    health: Health | None = None

    @property
    def incarnation(self) -> str:
        """Changes with every restart; empty before the first sign of life."""
        return self.health.incarnation if self.health else ""


@dataclass(frozen=True, slots=True)
class ServiceView:
    """All replicas; `version` changes when one appears, leaves, dies or comes back."""

    version: int
    replicas: tuple[ReplicaView, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What a service was started with, enough to add replicas to it later."""

    teacher: Teacher
    make_engine: bytes  # pickled, opaque to the registry
    runtime_env: dict[str, Any]
    detached: bool
    job: str  # of the driver that owns what is not detached
    role: Role = "teacher"

    def same_teacher(self, teacher: Teacher) -> bool:
        """Whether the other config asks for the same answers from the same hardware."""
        return self.teacher.model_copy(update={"replicas": teacher.replicas}) == teacher


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class TeacherRegistry:
    """Asks every replica for its health and tells clients what changed.

    A restarted registry finds the replicas again by their names.
    """

    def __init__(self, service: str, request: Request) -> None:
        self._service, self._request = service, request
        self._replicas: dict[str, ReplicaView] = {}
        self._watchers: dict[str, asyncio.Task] = {}
        # Versions of a restarted registry must differ from those before.
        self._version = time.time_ns()
        self._changed = asyncio.Event()
        self._found = replica_names(service)
        self._used: dict[str, float] = {}  # by user, when it last said so
        self._wanted = len(self._found) or request.teacher.replicas
        exporter.start(ray.util.metrics, service=service).sample(self._export)

    def __repr__(self) -> str:
        return f"registry({self._service})"

    async def request(self) -> Request:
        """What the service was started with."""
        return self._request

    async def view(self) -> ServiceView:
        """The list now."""
        self._adopt()
        return ServiceView(self._version, tuple(self._replicas.values()))

    async def wait_version(self, known: int, timeout_s: float) -> ServiceView:
        """The list as soon as its version is not `known`, or as it is after `timeout_s`."""
        self._adopt()
        deadline = time.monotonic() + timeout_s
        while self._version == known and (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return await self.view()

    async def use(self, user: str) -> None:
        """Note that a command uses the service, for USE_S."""
        self._used[user] = time.monotonic()

    async def leave(self, user: str) -> None:
        """It does no longer."""
        self._used.pop(user, None)

    async def users(self) -> list[str]:
        """Who uses the service."""
        since = time.monotonic() - USE_S
        return sorted(user for user, at in self._used.items() if at > since)

    async def want(self, replicas: int) -> None:
        """Note how many replicas the service shall have."""
        self._wanted = replicas

    async def add(self, names: list[str]) -> None:
        """Watch further replicas; returns when each has been looked at once."""
        self._found += names
        self._adopt()
        await asyncio.gather(*(self._look(name) for name in names))

    async def drain(self, names: list[str]) -> None:
        """Clients send nothing further to these."""
        for name in names:
            if name in self._replicas:
                self._put(replace(self._replicas[name], state="draining"))

    async def forget(self, names: list[str]) -> None:
        """Take replicas off the list."""
        for name in names:
            if self._replicas.pop(name, None) is not None:
                self._watchers.pop(name).cancel()
                for metric in (exported.REPLICA_UP, exported.REPLICA_RESTARTS):
                    exporter.current().set(metric, None, replica=short_name(name))
        self._announce()

    async def end(self) -> None:
        """Say of every replica that it is gone, before the service is."""
        self._wanted = 0
        await self.forget(list(self._replicas))
        exporter.current().refresh()

    def _export(self) -> None:
        """Set the gauges of what lives. Called by another thread."""
        export, replicas = exporter.current(), tuple(self._replicas.values())
        alive = [replica.state == "alive" for replica in replicas]
        export.set(exported.REPLICAS_WANTED, self._wanted)
        export.set(exported.REPLICAS_PRESENT, sum(alive))
        for replica, serves in zip(replicas, alive, strict=True):
            name = short_name(replica.name)
            export.set(exported.REPLICA_UP, serves, replica=name)
            export.set(exported.REPLICA_RESTARTS, replica.restarts, replica=name)

    def _adopt(self) -> None:
        """Begin to watch what was found or added."""
        for name in self._found:
            if name not in self._replicas:
                self._put(ReplicaView(name))
                self._watchers[name] = asyncio.ensure_future(self._watch(name))
        self._found = []

    async def _watch(self, name: str) -> None:
        while True:
            await self._look(name)
            await asyncio.sleep(POLL_S)

    async def _look(self, name: str) -> None:
        health = await self._health(name)
        before = self._replicas.get(name)
        if before is not None and before.state != "draining":
            self._put(_seen(before, health))

    async def _health(self, name: str) -> Health | None:
        try:
            handle: Any = ray.get_actor(name, namespace=self._service)
            return await asyncio.wait_for(handle.health.remote(), HEALTH_DEADLINE_S)
        except (RayError, ValueError, TimeoutError):
            return None

    def _put(self, replica: ReplicaView) -> None:
        before = self._replicas.get(replica.name)
        self._replicas[replica.name] = replica
        if before is None or (before.state, before.incarnation) != (
            replica.state,
            replica.incarnation,
        ):
            self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def replica_name(service: str, index: int) -> str:
    """Name of a replica's actor, as the dashboard lists it."""
    return f"{service}/{REPLICA}{index}"


def short_name(replica: str) -> str:
    """Name of a replica in its service."""
    return replica.rpartition("/")[2]


def index_of(replica: str) -> int:
    """Number of a replica in its service."""
    return int(short_name(replica).removeprefix(REPLICA))


def is_replica(actor: Mapping[str, str]) -> bool:
    """Whether a named actor, as Ray lists it, is a replica."""
    return actor["name"].startswith(f"{actor['namespace']}/{REPLICA}")


def replica_names(service: str) -> list[str]:
    """Names of the replicas that exist in the cluster, registered or not, oldest first."""
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    found = [a["name"] for a in named if a["namespace"] == service and is_replica(a)]
    return sorted(found, key=index_of)


def _seen(before: ReplicaView, health: Health | None) -> ReplicaView:
    if health is None:
        return before if before.state == "starting" else replace(before, state="down")
    restarted = before.health is not None and before.incarnation != health.incarnation
    return ReplicaView(
        name=before.name,
        state="failed" if health.failure else "alive",
        restarts=before.restarts + restarted,
        health=health,
    )

"""TeacherRegistry: the versioned list of a service's replicas. Carries no payload.

One zero-CPU actor per service, in a namespace named like the service. Clients long-poll it, so
they learn of new, dead and draining replicas while they train.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.util.metrics
from ray.exceptions import RayError

from shared.config.models.teachers import Autoscaling
from shared.run import exported, exporter
from teacher_service.service.kept import keep_replicas, kept_replicas
from teacher_service.service.replicas.actor import Health
from teacher_service.service.replicas.naming import Request, replica_names, short_name
from teacher_service.service.replicas.views import ReplicaView, ScaleView, ServiceView
from teacher_service.service.scaler import Scaler
from teacher_service.service.scaling.demand import Demand, Report
from teacher_service.service.scaling.policy import in_words, replicas

USE_S = 15.0  # a user that has not been heard of for so long is dead
POLL_S = 0.5
HEALTH_DEADLINE_S = 10.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class TeacherRegistry:
    """Asks every replica for its health and tells clients what changed.

    A restarted registry finds the replicas again by their names, and in the cluster's store the
    bounds that the service was given.
    """

    def __init__(self, service: str, request: Request) -> None:
        self._service, self._request = service, request
        if (kept := kept_replicas(service)) is not None:
            self._request = request.with_replicas(kept)
        self._replicas: dict[str, ReplicaView] = {}
        self._watchers: dict[str, asyncio.Task] = {}
        # Versions of a restarted registry must differ from those before.
        self._version = time.time_ns()
        self._changed = asyncio.Event()
        self._found = replica_names(service)
        self._used: dict[str, float] = {}  # by user, when it last said so
        self._fixed = len(self._found) or self._request.teacher.fewest
        self._demand = Demand(request.pace.grow_s)
        self._scaler: Scaler | None = None
        self._lines: list[str] = []  # about scaling, in the words of people
        self._ended = False
        exporter.start(ray.util.metrics, service=service).sample(self._export)
        # A call begins the watching, which needs the event loop, also after a restart.
        ray.get_runtime_context().current_actor.view.remote()

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

    async def report(self, report: Report) -> None:
        """Take what a client says about itself."""
        self._demand.report(report, time.monotonic())

    async def scale_view(self, since: int = 0) -> ScaleView:
        """How many replicas are wanted, with what was said about it after so many lines."""
        self._adopt()
        bounds = self._request.teacher.replicas
        return ScaleView(
            wanted=self._wanted,
            bounds=bounds if isinstance(bounds, Autoscaling) else None,
            waiting=self._demand.waiting(time.monotonic()),
            told=len(self._lines),
            lines=tuple(self._lines[since:]),
        )

    async def rescale(self, asked: int | Autoscaling) -> None:
        """Scale by other bounds, or with a number not at all."""
        self._fixed = self._wanted
        keep_replicas(self._service, asked)
        self._request = self._request.with_replicas(asked)
        told = in_words(asked) if isinstance(asked, Autoscaling) else "a number that is fixed"
        self._lines.append(f"{told}, as asked for")
        if self._scaler is not None:
            self._scaler.stop()
            self._scaler = None
        self._adopt()

    async def want(self, number: int, why: str) -> None:
        """Note how many replicas a service of a fixed number shall have."""
        if number != self._fixed:
            self._lines.append(f"{self._fixed} -> {replicas(number)}, {why}")
        self._fixed = number

    def listed(self) -> Sequence[ReplicaView]:
        """The list, for the scaler."""
        return tuple(self._replicas.values())

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
        self._fixed, self._ended = 0, True
        if self._scaler is not None:
            self._scaler.stop()
            self._scaler = None
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

    @property
    def _wanted(self) -> int:
        return self._fixed if self._scaler is None else self._scaler.wanted

    def _adopt(self) -> None:
        """Begin to watch what was found or added, and to scale."""
        for name in self._found:
            if name not in self._replicas:
                self._put(ReplicaView(name))
                self._watchers[name] = asyncio.ensure_future(self._watch(name))
        self._found = []
        scales = isinstance(self._request.teacher.replicas, Autoscaling)
        if scales and self._replicas and self._scaler is None and not self._ended:
            self._scaler = Scaler(
                self._service,
                self._request,
                self,
                self._demand,
                wanted=self._fixed,
                lines=self._lines,
            )

    async def _watch(self, name: str) -> None:
        while True:
            await self._look(name)
            await asyncio.sleep(POLL_S)

    async def _look(self, name: str) -> None:
        health = await self._health(name)
        before = self._replicas.get(name)
        if before is not None and before.state != "draining":
            self._put(before.seen(health))

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

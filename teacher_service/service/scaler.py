"""Scaler: carries out what the policy of scaling decides for one service.

Lives in the service's registry, whose list of replicas it goes by, and keeps only what is on its
way: replicas that are placed or load, and replicas that finish their work.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError

from shared.config.models.teachers import Autoscaling
from shared.errors import PlacementError, TeacherError
from teacher_service.service.replicas.launching import launch, remove
from teacher_service.service.replicas.naming import Request, find_actor, index_of, replica_name
from teacher_service.service.replicas.placing import ask_for_place, group_name, groups_of
from teacher_service.service.replicas.views import ReplicaView
from teacher_service.service.scaling.demand import Demand
from teacher_service.service.scaling.policy import (
    Decision,
    Observation,
    Phase,
    Replica,
    State,
    decide,
)

TICK_S = 1.0
DRAIN_GRACE_S = 1.0  # until every client has heard that a replica drains
DRAIN_S = 1800.0


class Registered(Protocol):
    """The list of replicas, as the registry keeps it."""

    def listed(self) -> Sequence[ReplicaView]: ...
    async def add(self, names: list[str]) -> None: ...
    async def drain(self, names: list[str]) -> None: ...
    async def forget(self, names: list[str]) -> None: ...


class Scaler:
    """Follows the bounds of one service until it is stopped; all in the registry's event loop.

    `lines` is what it appends its decisions to, in the words of people.
    """

    def __init__(
        self,
        service: str,
        request: Request,
        registered: Registered,
        demand: Demand,
        *,
        wanted: int,
        lines: list[str],
    ) -> None:
        assert isinstance(request.teacher.replicas, Autoscaling), "the service scales itself"
        self._service, self._request, self._bounds = service, request, request.teacher.replicas
        self._registered, self._demand = registered, demand
        self._state = State(min(max(wanted, self._bounds.min), self._bounds.max))
        self._arriving: dict[str, asyncio.Task] = {}
        self._leaving: dict[str, asyncio.Task] = {}
        self._failed: dict[str, str] = {}  # why a replica cannot serve
        self._phases: dict[str, tuple[Phase, float]] = {}  # and since when
        self._fingerprint: dict[str, str] | None = None
        self._lines = lines
        self._task = asyncio.ensure_future(self._keep_deciding())

    @property
    def wanted(self) -> int:
        """Replicas that the service shall have."""
        return self._state.wanted

    def stop(self) -> None:
        """Decide nothing more, and remove what does not serve yet."""
        self._task.cancel()
        self._release(tuple(self._arriving))

    async def _keep_deciding(self) -> None:
        said = ""
        while True:
            try:
                await self._tick()
            except (RayError, PlacementError, RuntimeError) as error:
                if said != (said := f"its replicas cannot be looked after: {_sentence(error)}"):
                    self._lines.append(said)
            await asyncio.sleep(TICK_S)

    async def _tick(self) -> None:
        now = time.monotonic()
        alive = [view for view in self._registered.listed() if view.state == "alive"]
        busy = {view.incarnation: view.health.busy_s for view in alive if view.health}
        self._demand.work(busy, now)
        seen = Observation(
            self._replicas(now),
            waiting=self._demand.waiting(now),
            busy=self._demand.busy(now),
            units=self._demand.units(now),
        )
        decision = decide(seen, self._state, self._bounds, now, self._request.pace)
        self._state = decision.state
        self._lines += decision.lines
        await self._carry_out(decision)

    def _replicas(self, now: float) -> tuple[Replica, ...]:
        """All that exist, in their phases."""
        placed = {name for name, group in groups_of(self._service).items() if group.placed}
        views = {view.name: view for view in self._registered.listed()}
        names = sorted({*views, *self._arriving}, key=index_of)
        phases: dict[str, Phase] = {n: self._phase(n, views.get(n), placed) for n in names}
        for name, phase in phases.items():
            if self._phases.get(name, ("", 0.0))[0] != phase:
                self._phases[name] = (phase, now)
        self._phases = {name: self._phases[name] for name in names}
        return tuple(
            Replica(name, *self._phases[name], self._failed.get(name, "")) for name in names
        )

    def _phase(self, name: str, view: ReplicaView | None, placed: set[str]) -> Phase:
        if name in self._leaving:
            return "leaving"
        if view is not None and view.state == "failed" and view.health is not None:
            self._failed[name] = view.health.failure
        if name in self._failed:
            return "failed"
        if view is not None and view.state == "alive":
            return "serving"
        return "starting" if group_name(self._service, name) in placed else "placing"

    async def _carry_out(self, decision: Decision) -> None:
        if decision.release:
            self._release(decision.release)
            await self._registered.forget([*decision.release])
        for name in decision.drain:
            self._leaving[name] = asyncio.ensure_future(self._leave(name))
        first = 1 + max((index_of(name) for name in self._phases), default=-1)
        for index in range(first, first + decision.add):
            name = replica_name(self._service, index)
            group = ask_for_place(self._service, name, self._request)
            replica = launch(self._service, name, group, self._request)
            self._arriving[name] = asyncio.ensure_future(self._arrive(name, replica))

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._failed.pop(name, None)
            if (task := self._arriving.pop(name, None)) is not None:
                task.cancel()
        remove(self._service, names)

    async def _arrive(self, name: str, replica: Any) -> None:
        """Put a replica on the list when it has loaded and is the same teacher as the others."""
        try:
            description = await replica.describe.remote()
            if description.fingerprint != (
                await self._own_fingerprint() or description.fingerprint
            ):
                raise TeacherError(
                    "it is not the same teacher as the others: its node differs in device, "
                    "threads or library versions; use one kind of node"
                )
            await self._registered.add([name])
            self._arriving.pop(name, None)
        except Exception as error:  # whatever loading raises reaches people as a line
            self._failed[name] = _sentence(error)

    async def _own_fingerprint(self) -> dict[str, str] | None:
        """The teacher that serves; None where none does."""
        for view in self._registered.listed():
            if self._fingerprint is None and view.state == "alive":
                with suppress(RayError):
                    serving = find_actor(self._service, view.name)
                    self._fingerprint = (await serving.describe.remote()).fingerprint
        return self._fingerprint

    async def _leave(self, name: str) -> None:
        """Take a replica off the list, let it finish, then remove it."""
        await self._registered.drain([name])
        await asyncio.sleep(DRAIN_GRACE_S)
        with suppress(RayError, TimeoutError):
            if (replica := find_actor(self._service, name)) is not None:
                await asyncio.wait_for(replica.flush.remote(), DRAIN_S)
        remove(self._service, [name])
        await self._registered.forget([name])
        del self._leaving[name]


def _sentence(error: Exception) -> str:
    """The last line of what it says."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]

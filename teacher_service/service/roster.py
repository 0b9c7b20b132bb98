"""Roster: the replicas one client uses, kept up to date by long-polling the registry."""

import time
from collections.abc import Callable
from typing import Any

import ray
import xxhash
from ray.exceptions import RayError

from shared.errors import ConfigError
from teacher_service.service.replicas.naming import REGISTRY
from teacher_service.service.replicas.views import ReplicaView, ServiceView
from teacher_service.service.scaling.demand import Report

LONG_POLL_S = 60.0
SUSPEND_S = 10.0
REPORT_S = 1.0
RETRY_S = 1.0  # between looks for a registry that is gone


class Roster:
    """The replicas a client uses: a small stable subset of those alive.

    `gone` says whether the service was there when the registry was last looked for.
    """

    def __init__(self, service: str, client: str, size: int) -> None:
        self._service, self._client, self._size = service, client, size
        self._alive: dict[str, ReplicaView] = {}
        self._handles: dict[str, Any] = {}
        self._suspended: dict[str, tuple[str, float]] = {}  # name -> incarnation, until
        self._version, self._looked_up, self.gone = -1, 0.0, False
        self._registry: Any = None
        self._told: Any = None  # the last report
        self._told_at = 0.0
        self.poll: Any = self._long_poll()
        if self.poll is None:
            raise ConfigError(
                f"no teacher service named {service} is running; start it with `tutelage teacher "
                "up`, or let `tutelage run` start one"
            )

    def refresh(self) -> None:
        """Take over a new list if one has come; never blocks."""
        if self.poll is None:
            if time.monotonic() - self._looked_up > RETRY_S:
                self.poll = self._long_poll()
            return
        if not ray.wait([self.poll], timeout=0)[0]:
            return
        try:
            view: ServiceView = ray.get(self.poll)
        except RayError:
            self.poll = None
            return
        self._version = view.version
        self._alive = {r.name: r for r in view.replicas if r.state == "alive"}
        self.poll = self._long_poll()

    def tell(self, standing: Callable[[], Report]) -> None:
        """Let the registry know once a second how the client is, unless it has not heard the last
        time yet."""
        due = time.monotonic() > self._told_at + REPORT_S
        if (
            not due
            or self.poll is None
            or (self._told and not ray.wait([self._told], timeout=0)[0])
        ):
            return
        self._told, self._told_at = self._registry.report.remote(standing()), time.monotonic()

    def usable(self) -> list[str]:
        """Names in this client's order of preference, without those that just failed."""
        ranked = sorted(self._alive, key=self._rank)[: self._size]
        return [name for name in ranked if not self._is_suspended(name)]

    def suspend(self, name: str) -> None:
        """Leave a replica alone until it has restarted or some seconds have passed."""
        known = self._alive[name].incarnation if name in self._alive else ""
        self._suspended[name] = (known, time.monotonic() + SUSPEND_S)
        self._handles.pop(name, None)

    def handle(self, name: str) -> Any:
        """The replica's actor, or None where it is gone."""
        if name not in self._handles:
            try:
                self._handles[name] = ray.get_actor(name, namespace=self._service)
            except ValueError:
                return None
        return self._handles[name]

    def _is_suspended(self, name: str) -> bool:
        incarnation, until = self._suspended.get(name, ("", 0.0))
        return time.monotonic() < until and self._alive[name].incarnation == incarnation

    def _rank(self, name: str) -> str:
        # Rendezvous hashing: adding a replica moves as few clients as possible.
        return xxhash.xxh3_128_hexdigest(f"{self._client}/{name}".encode())

    def _long_poll(self) -> Any:
        self._looked_up = time.monotonic()
        try:
            self._registry = ray.get_actor(REGISTRY, namespace=self._service)
        except ValueError:
            self.gone = True
            return None
        self.gone = False
        return self._registry.wait_version.remote(self._version, LONG_POLL_S)

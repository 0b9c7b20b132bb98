"""Replicas as clients and drivers see them."""

from dataclasses import dataclass, replace
from typing import Literal

from shared.config.models.teachers import Autoscaling
from teacher_service.service.replicas.actor import Health

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

    def seen(self, health: Health | None) -> "ReplicaView":
        """The view after another look; None: it gave no sign of life."""
        if health is None:
            return self if self.state == "starting" else replace(self, state="down")
        restarted = self.health is not None and self.incarnation != health.incarnation
        return ReplicaView(
            name=self.name,
            state="failed" if health.failure else "alive",
            restarts=self.restarts + restarted,
            health=health,
        )


@dataclass(frozen=True, slots=True)
class ServiceView:
    """All replicas; `version` changes when one appears, leaves, dies or comes back."""

    version: int
    replicas: tuple[ReplicaView, ...]


@dataclass(frozen=True, slots=True)
class ScaleView:
    """How many replicas a service shall have, and why."""

    wanted: int
    bounds: Autoscaling | None  # None: the number is fixed
    waiting: float  # share of their time that steps waited lately
    told: int  # lines about scaling so far
    lines: tuple[str, ...]  # those since the one that was asked from

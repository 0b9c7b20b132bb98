"""Teacher services as a run's folder has them: what they are now, and what was said when their
number of replicas changed."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir, write_atomically

STALE_S = 30.0  # a driver lists services every few seconds


class ServiceStanding(TypedDict):
    """How many replicas one service has."""

    name: str
    present: int  # that serve
    wanted: int
    min: int | None  # bounds of one that scales itself; None where the number is fixed
    max: int | None
    waiting: float  # share of their time that steps waited for it lately


class ReplicaStanding(TypedDict):
    """One replica, as its service's registry last saw it."""

    service: str
    name: str
    state: str  # "starting", "alive", "failed", "down" or "draining"
    units: int  # answered since it started
    tokens: int
    restarts: int


class Roll(TypedDict):
    """The services that a run at work uses, and their replicas."""

    services: list[ServiceStanding]
    replicas: list[ReplicaStanding]


class ScalingLine(TypedDict):
    """One decision on the number of replicas, or what came of it."""

    time: float  # seconds since the epoch
    step: int  # of the last metrics line by then
    service: str
    line: str  # for people


def write_roll(path: Path, roll: Roll) -> None:
    """Say what services are now. Raises StorageError."""
    write_atomically(path, json.dumps(roll) + "\n")


def read_roll(run_dir: RunDir) -> Roll:
    """What the driver wrote last of teachers, and of the student's copies that write."""
    found = [_read(path) for path in (run_dir.replicas, run_dir.rollout_replicas)]
    return Roll(
        services=[service for roll in found for service in roll["services"]],
        replicas=[replica for roll in found for replica in roll["replicas"]],
    )


def _read(path: Path) -> Roll:
    """What one file says, unless nobody has written it for long."""
    try:
        fresh = time.time() - path.stat().st_mtime < STALE_S
        found = json.loads(path.read_text()) if fresh else None
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, Mapping) else Roll(services=[], replicas=[])  # type: ignore[return-value]


def note_scaling(run_dir: RunDir, service: str, line: str) -> None:
    """Keep what a service said about its number of replicas. Raises OSError."""
    lines = read_metrics(run_dir.metrics)
    said = ScalingLine(
        time=time.time(), step=lines[-1].step if lines else 0, service=service, line=line
    )
    with run_dir.scaling.open("a") as file:
        file.write(json.dumps(said) + "\n")


def read_scaling(path: Path) -> list[ScalingLine]:
    """All that was said, in its order; a torn line is skipped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found

"""Where a run stands, read from its folder: of a run at work, a finished one, or a dead one."""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import psutil
from filelock import FileLock, Timeout

from cluster.report.record import RunRecord, read_record
from cluster.report.services import ReplicaStanding, ServiceStanding, read_roll
from shared.errors import DamagedError
from shared.run.metrics import StepMetrics
from shared.run.run_dir import RunDir, read_written
from student_trainer.state.checkpoint import latest_checkpoint, step_of


class DomainStanding(TypedDict):
    """One domain as of the last metrics line; None without a teacher."""

    weight: float  # share of loss tokens
    kl: float | None  # nats per loss token, training text
    kl_first: float | None  # of the first line
    epochs: float | None
    tokens: int  # loss tokens so far


class WorkersStanding(TypedDict):
    """The student's workers, as the command that trains it last said."""

    fewest: int
    wanted: int
    present: int


class Standing(TypedDict):
    """What `tutelage status RUN --json` prints. Times are seconds; None before the first line."""

    run: str
    folder: str
    state: str  # "at work", "finished", "failed", "interrupted" or "unfinished"
    step: int
    steps: int
    checkpoint: int | None  # the step that a resume goes on from
    phase: int | None  # from 0; None without phases
    loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens_per_s: float | None
    teacher_wait_fraction: float | None
    seconds_per_step: float | None
    eta_s: float | None  # of training alone; None for a run that is not at work
    line_age_s: float | None  # since the last metrics line was written
    start: dict[str, float]  # seconds by stage of the last start
    said: str  # the last line for people
    domains: dict[str, DomainStanding]
    failures: dict[str, int]
    services: list[ServiceStanding]  # that a run at work uses
    replicas: list[ReplicaStanding]  # of these
    workers: WorkersStanding | None  # of a run at work


def read_standing(run_dir: RunDir) -> Standing:
    """A run's standing. Raises ConfigError where the folder holds no run."""
    record = read_record(run_dir.path)
    line = record.lines[-1] if record.lines else None
    working = in_use(run_dir)
    pace_s = _seconds_per_step(record)
    checkpoint = latest_checkpoint(run_dir.checkpoints) if run_dir.checkpoints.is_dir() else None
    saved, roll = step_of(checkpoint) if checkpoint else None, read_roll(run_dir)
    return Standing(
        run=record.config.name,
        folder=str(run_dir.path),
        state="at work" if working else _state(run_dir),
        step=max(record.steps, saved or 0),  # lines may be lost
        steps=record.config.steps,
        checkpoint=saved,
        phase=line.phase if line else None,
        loss=line.loss if line else None,
        grad_norm=line.grad_norm if line else None,
        lr=line.lr if line else None,
        tokens_per_s=line.tokens_per_s if line else None,
        teacher_wait_fraction=line.teacher_wait_s / line.seconds if line and line.seconds else None,
        seconds_per_step=pace_s,
        eta_s=pace_s * (record.config.steps - record.steps) if working and pace_s else None,
        line_age_s=max(0.0, time.time() - run_dir.metrics.stat().st_mtime) if line else None,
        start=read_written(run_dir.start),
        said=_last_line(run_dir.progress),
        domains={name: _domain(record.lines, name) for name in record.domains if line},
        failures={"student_restarts": 0, "teacher_restarts": 0}
        | read_written(run_dir.logs / "failures.json")
        | {"retried_units": sum(line.retried_units for line in record.lines)},
        services=roll["services"] if working else [],
        replicas=roll["replicas"] if working else [],
        workers=_workers(run_dir.workers) if working else None,
    )


def in_use(run_dir: RunDir) -> bool:
    """Whether a command has the run's folder."""
    lock = run_dir.path.parent / f".{run_dir.path.name}.lock"
    owner = lock.with_suffix(".owner")
    if not owner.exists() or _dead(owner):
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _dead(owner: Path) -> bool:
    """Whether the process named in an owner's file was one of this machine that is gone."""
    try:
        _, pid, _, host = owner.read_text().split()
        return host == socket.gethostname() and not psutil.pid_exists(int(pid))
    except (OSError, ValueError):
        return False


def _state(run_dir: RunDir) -> str:
    """Of a run that no command has, as its summary says it."""
    try:
        return read_written(run_dir.summary)["status"]
    except (OSError, DamagedError, KeyError):
        return "unfinished"


def _seconds_per_step(record: RunRecord) -> float | None:
    """Training time of a step, over the last line."""
    lines = list(record.lines)
    if not lines:
        return None
    before = lines[-2].step if len(lines) > 1 else 0
    return lines[-1].seconds / max(1, record.steps - before)


def _domain(lines: Sequence[StepMetrics], name: str) -> DomainStanding:
    told = [line.domains[name] for line in lines if name in line.domains]
    kls = [domain.kl for domain in told if domain.kl is not None]
    return DomainStanding(
        weight=told[-1].weight,
        kl=kls[-1] if kls else None,
        kl_first=kls[0] if kls else None,
        epochs=told[-1].epochs,
        tokens=sum(domain.tokens for domain in told),
    )


def _workers(described: Path) -> WorkersStanding | None:
    """What the driver wrote last."""
    try:
        return json.loads(described.read_text())
    except (OSError, ValueError):
        return None


def _last_line(path: Path) -> str:
    """The last line of a file of lines, however long the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""

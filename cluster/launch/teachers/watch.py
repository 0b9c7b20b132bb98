"""Use: a command tells the teacher services it uses that it does, hears when one is gone or scales
itself, and lists what their replicas do."""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.planning.preparation import Launch
from cluster.report.services import (
    ReplicaStanding,
    Roll,
    ServiceStanding,
    note_scaling,
    write_roll,
)
from shared.errors import TutelageError
from shared.run.run_dir import RunDir
from teacher_service.service import service as services
from teacher_service.service.pool import AGAIN
from teacher_service.service.registry import USE_S
from teacher_service.service.replicas.naming import short_name

EVERY_S = USE_S / 6


@contextmanager
def using(
    names: Collection[str],
    run_dir: RunDir,
    *,
    gone: str,
    what: str = "teacher service",
    roll: Path | None = None,
) -> Iterator[None]:
    """Use services for a run, for the length of a `with`; `gone` says what to do where one is not
    there, and `what` they are. Meanwhile a file of the run, by default that of teachers, lists
    their replicas, and its folder keeps how their number changes."""
    ended, path = threading.Event(), roll or run_dir.replicas
    threads = [
        threading.Thread(
            target=_until,
            args=(ended, _use, f"{what} {name}", name, run_dir, gone, ended),
            daemon=True,
        )
        for name in names
    ]
    listing = (ended, _list, names, path, ended)
    threads.append(threading.Thread(target=_until, args=listing, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        path.unlink(missing_ok=True)


def when_gone(launch: Launch) -> str:
    """What happens where a service that a command uses is gone."""
    if launch.services is None:
        return AGAIN
    patience_s = launch.config.service.unit_deadline_s
    return (
        "`tutelage teacher up CONFIG` starts it again, and this command goes on; it waits for "
        f"{patience_s:g} s at most"
    )


def restarts_of(name: str) -> int:
    """Restarts of a service's replicas so far; one that is down is being restarted."""
    try:
        replicas = services.status(name).replicas
        return sum(replica.restarts + (replica.state == "down") for replica in replicas)
    except TutelageError:
        return 0  # the service is gone, and what it knew with it


def _until(ended: threading.Event, work: Callable[..., None], *arguments: object) -> None:
    """Work in a thread; after the end, what it asks may be gone already."""
    try:
        work(*arguments)
    except Exception:
        if not ended.is_set():
            raise


def _use(called: str, name: str, run_dir: RunDir, gone: str, ended: threading.Event) -> None:
    there, told, user = True, _told(name), str(run_dir.path)
    while not ended.is_set():
        before, there = there, services.use(name, user)
        if before and not there and not ended.is_set():
            print(f"{called} is gone; {gone}", flush=True)
        if there and not before:
            print(f"{called} is back", flush=True)
        told = _say_scaling(called, name, told, run_dir)
        ended.wait(EVERY_S)
    _say_scaling(called, name, told, run_dir)
    services.leave(name, user)


def _told(name: str) -> int:
    """How many lines a service has about its scaling."""
    view = services.scaling_since(name, 0)
    return view.told if view else 0


def _say_scaling(called: str, name: str, told: int, run_dir: RunDir) -> int:
    """Print and keep what a service has decided after so many lines; returns how many there are."""
    view = services.scaling_since(name, told)
    if view is None:
        return told
    for line in view.lines:
        print(f"{called}: {line}", flush=True)
        with suppress(OSError):  # a full disk, of which others tell
            note_scaling(run_dir, name, line)
    return view.told


def _list(names: Collection[str], roll: Path, ended: threading.Event) -> None:
    while not ended.is_set():
        with suppress(TutelageError):  # a full disk, or a service that is gone
            write_roll(roll, _roll([services.status(name) for name in names]))
        ended.wait(EVERY_S)


def _roll(found: Collection[services.ServiceStatus]) -> Roll:
    """What services are now."""
    return Roll(
        services=[_service(status) for status in found],
        replicas=[
            ReplicaStanding(
                service=status.service,
                name=short_name(replica.name),
                state=replica.state,
                units=replica.health.units if replica.health else 0,
                tokens=replica.health.tokens if replica.health else 0,
                restarts=replica.restarts,
            )
            for status in found
            for replica in status.replicas
        ],
    )


def _service(status: services.ServiceStatus) -> ServiceStanding:
    scale = status.scale
    bounds = scale.bounds if scale else None
    return ServiceStanding(
        name=status.service,
        present=sum(replica.state == "alive" for replica in status.replicas),
        wanted=scale.wanted if scale else len(status.replicas),
        min=bounds.min if bounds else None,
        max=bounds.max if bounds else None,
        waiting=scale.waiting if scale else 0.0,
    )

"""Use: a command tells the teacher services it uses that it does, hears when one is gone or scales
itself, and lists what their replicas do."""

import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.planning.preparation import Launch
from cluster.report.standing import ReplicaStanding
from shared.errors import TutelageError
from shared.run.run_dir import write_atomically
from teacher_service.service import service as services
from teacher_service.service.naming import short_name
from teacher_service.service.pool import AGAIN
from teacher_service.service.registry import USE_S

EVERY_S = USE_S / 6


@contextmanager
def using(names: Collection[str], *, user: str, gone: str, roll: Path) -> Iterator[None]:
    """Use services for the length of a `with`; `gone` says what to do where one is not there, and
    `roll` is the file that their replicas are listed in meanwhile."""
    ended = threading.Event()
    threads = [
        threading.Thread(target=_use, args=(name, user, gone, ended), daemon=True) for name in names
    ]
    threads.append(threading.Thread(target=_list, args=(names, roll, ended), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        roll.unlink(missing_ok=True)


def when_gone(launch: Launch) -> str:
    """What happens where a service that a command uses is gone."""
    if launch.services is None:
        return AGAIN
    patience_s = launch.config.service.unit_deadline_s
    return (
        "`tutelage teacher up CONFIG` starts it again, and this command goes on; it waits for "
        f"{patience_s:g} s at most"
    )


def _use(name: str, user: str, gone: str, ended: threading.Event) -> None:
    there, told = True, _told(name)
    while not ended.is_set():
        before, there = there, services.use(name, user)
        if before and not there:
            print(f"teacher service {name} is gone; {gone}", flush=True)
        if there and not before:
            print(f"teacher service {name} is back", flush=True)
        told = _say_scaling(name, told)
        ended.wait(EVERY_S)
    services.leave(name, user)


def _told(name: str) -> int:
    """How many lines a service has about its scaling."""
    view = services.scaling_since(name, 0)
    return view.told if view else 0


def _say_scaling(name: str, told: int) -> int:
    """Print what a service has decided after so many lines; returns how many there are."""
    view = services.scaling_since(name, told)
    if view is None:
        return told
    for line in view.lines:
        print(f"teacher service {name}: {line}", flush=True)
    return view.told


def _list(names: Collection[str], roll: Path, ended: threading.Event) -> None:
    while not ended.is_set():
        with suppress(TutelageError):  # a full disk, or a service that is gone
            found = [replica for name in names for replica in _replicas(name)]
            write_atomically(roll, json.dumps(found) + "\n")
        ended.wait(EVERY_S)


def _replicas(name: str) -> list[ReplicaStanding]:
    """What the replicas of one service do."""
    return [
        ReplicaStanding(
            service=name,
            name=short_name(replica.name),
            state=replica.state,
            units=replica.health.units if replica.health else 0,
            tokens=replica.health.tokens if replica.health else 0,
            restarts=replica.restarts,
        )
        for replica in services.status(name).replicas
    ]

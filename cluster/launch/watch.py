"""Use: a command tells the teacher services it uses that it does, and hears when one is gone."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cluster.planning.preparation import Launch
from teacher_service.service import service as services
from teacher_service.service.registry import USE_S

EVERY_S = USE_S / 6


@contextmanager
def using(names: Iterable[str], *, user: str, gone: str) -> Iterator[None]:
    """Use services for the length of a `with`; `gone` says what to do where one is not there."""
    ended = threading.Event()
    threads = [
        threading.Thread(target=_use, args=(name, user, gone, ended), daemon=True) for name in names
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def when_gone(launch: Launch) -> str:
    """What to do where a service that a command uses is gone."""
    patience_s = launch.config.service.unit_deadline_s
    again = (
        "stop this command with Ctrl-C, and the same command starts a teacher again"
        if launch.services is None
        else "`tutelage teacher up CONFIG` starts it again, and this command goes on"
    )
    return f"{again}; it waits for {patience_s:g} s at most"


def _use(name: str, user: str, gone: str, ended: threading.Event) -> None:
    there = True
    while not ended.is_set():
        before, there = there, services.use(name, user)
        if before and not there:
            print(f"teacher service {name} is gone; {gone}", flush=True)
        if there and not before:
            print(f"teacher service {name} is back", flush=True)
        ended.wait(EVERY_S)
    services.leave(name, user)

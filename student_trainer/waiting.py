"""What is waited for, said once it takes long."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SAY_S = 30.0  # waited before it is said, and said again after twice as long


@contextmanager
def waiting(what: str, say: Callable[[str], object]) -> Iterator[None]:
    """Say, while a `with` takes long, what it waits for, and for how long already."""
    ended, started = threading.Event(), time.monotonic()

    def watch() -> None:
        patience_s = SAY_S
        while not ended.wait(started + patience_s - time.monotonic()):
            with suppress(OSError):  # a full disk ends no wait
                say(f"{what} for {patience_s:.0f} s")
            patience_s *= 2

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()

"""Work that one process does while others wait for what it makes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(lock: Path, *, making: str) -> Iterator[None]:
    """Hold a lock file, as the only process; where another has it, say so once and wait.

    `making` names what is made under it: what a user sees where a command stands still. A process
    that ends, however it does, holds the lock no longer.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        said = f"another process makes {making}; waiting until it has ({lock})"
        print(said, file=sys.stderr, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()

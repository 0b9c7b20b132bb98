"""Leases of the processes that use a folder, so that nothing is removed under them.

A lease is a file that its process holds locked for as long as it lives; the operating system lets
go when it dies. Whoever clears up holds a gate, at which new leases wait. Only folders of this
machine's file systems can be leased.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from shared.locations import Location

SUFFIX = ".lease"


class Lease:
    """This process's lease of a folder, once it is set; where nothing may be written, none."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder.local
        self._lock: FileLock | None = None

    def set(self) -> bool:
        """Lease the folder; whether this call did."""
        if self._folder is None or self._lock is not None:
            return False
        with suppress(OSError, NotImplementedError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with _gate(self._folder):
                self._folder.mkdir(exist_ok=True)
                lock = FileLock(self._folder / f".{uuid.uuid4().hex}{SUFFIX}")
                lock.acquire()
                self._lock = lock
        return self._lock is not None

    def clear(self) -> None:
        """Give the lease back."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


@contextmanager
def unused(folder: Location) -> Iterator[bool]:
    """Whether no process uses a local folder, and none begins to within the `with`; leases of dead
    processes are removed."""
    if folder.local is None:
        yield True
        return
    with _gate(folder.local):
        yield not [lease for lease in folder.local.glob(f".*{SUFFIX}") if _is_held(lease)]


def _gate(folder: Path) -> FileLock:
    return FileLock(folder.parent / f".{folder.name}.gate")


def _is_held(lease: Path) -> bool:
    lock = FileLock(lease, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lease.unlink(missing_ok=True)
    lock.release()
    return False

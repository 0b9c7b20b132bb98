"""Blocks that others write while a step is learnt.

A block is begun by all ranks together and finished by each rank alone, in a thread of its own.
One block at a time is under way, and the next is begun once all ranks have finished it: so what was
written of earlier blocks lies on disk for everybody, and who is slower than whom decides nothing.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.errors import TutelageError
from student_trainer.ranks import Ranks

ENDS_S = 5.0  # within which a thread ends that is told to

Value = TypeVar("Value")


@dataclass(slots=True)
class Apart(Generic[Value]):
    """Finishes one block after the other beside the thread that learns."""

    ranks: Ranks
    _under_way: tuple[threading.Thread, Future[Value]] | None = field(default=None)

    def begin(self, finish: Callable[[], Value]) -> Future[Value]:
        """Have a block finished that all ranks have begun; none is under way."""
        assert self._under_way is None, "one block at a time"
        future = Future[Value]()
        thread = threading.Thread(target=_fulfil, args=(future, finish), daemon=True)
        self._under_way = thread, future
        thread.start()
        return future

    @property
    def is_under_way(self) -> bool:
        """Whether a block is begun and not settled, the same on every rank."""
        return self._under_way is not None

    def settle(self) -> None:
        """Wait until all ranks have finished the block under way, if there is one. Raises the first
        rank's error on all."""
        if self._under_way is None:
            return
        (_, future), self._under_way, found = self._under_way, None, None
        error = future.exception()
        if isinstance(error, TutelageError):
            found = error
        elif error is not None:
            raise error
        self.ranks.agree(found)

    def close(self) -> None:
        """Let a thread end whose block nobody waits for any more."""
        if self._under_way is not None:
            self._under_way[0].join(ENDS_S)


def _fulfil(future: Future[Value], finish: Callable[[], Value]) -> None:
    try:
        future.set_result(finish())
    except BaseException as error:
        future.set_exception(error)

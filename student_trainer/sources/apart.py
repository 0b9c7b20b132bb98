"""Blocks that others write while a step is learnt.

A block is begun by all ranks together and finished by each rank alone, in a thread of its own, one
after the other in the order in which they were begun. All ranks learn together that all have
finished a block, when they come to it: so who is slower than whom decides nothing.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.errors import TutelageError
from student_trainer.ranks import Ranks

ENDS_S = 5.0  # within which threads end that are told to

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Block(Generic[Value]):
    step: int
    thread: threading.Thread
    future: Future[Value]


@dataclass(slots=True)
class Apart(Generic[Value]):
    """Finishes one block after the other beside the thread that learns."""

    ranks: Ranks
    _under_way: deque[_Block[Value]] = field(default_factory=deque)  # the oldest first

    def begin(self, step: int, finish: Callable[[], Value]) -> Future[Value]:
        """Have the block of a step finished, which all ranks have begun, after those before it."""
        future, before = Future[Value](), self._under_way[-1] if self._under_way else None
        arguments = (future, finish, before and before.future)
        thread = threading.Thread(target=_fulfil, args=arguments, daemon=True)
        self._under_way.append(_Block(step, thread, future))
        thread.start()
        return future

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The steps whose blocks are begun and not settled, the same on every rank."""
        return tuple(block.step for block in self._under_way)

    def settle(self) -> None:
        """Wait until all ranks have finished the oldest block under way. Raises the first rank's
        error on all."""
        block, found = self._under_way.popleft(), None
        error = block.future.exception()
        if isinstance(error, TutelageError):
            found = error
        elif error is not None:
            raise error
        self.ranks.agree(found)

    def close(self) -> None:
        """Let threads end whose blocks nobody waits for any more."""
        for block in self._under_way:
            block.thread.join(ENDS_S)


def _fulfil(
    future: Future[Value], finish: Callable[[], Value], before: Future[Value] | None
) -> None:
    try:
        if before is not None:
            before.result()  # what it raised stops those that come after it
        future.set_result(finish())
    except BaseException as error:
        future.set_exception(error)

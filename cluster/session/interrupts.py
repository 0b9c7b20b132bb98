"""SIGINT, SIGTERM and SIGHUP: all end a command in order; where a stage can save what it has done,
the first one asks it to, and only the next one ends it at once.

Ray sets handlers of its own whenever it starts or joins a cluster, after which SIGTERM takes the
cluster from under the command; `kept` lets ours stand. A launcher may send its signal to every
process of a job, as Slurm does; the command alone answers it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from shared.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNSAVED = "Interrupted; the same command starts again."
SAME_S = 1.0  # a launcher may send its signal twice: to the command, and to its process group

Ask = Callable[[], str | None]


@dataclass(slots=True)
class _State:
    """Of this process."""

    handling: bool = False
    ask: Ask | None = None  # who is asked first
    heard_at: float = -SAME_S  # when a signal came last
    sentences: list[Callable[[], str]] = field(default_factory=list)  # of `interrupted_as`


_state = _State()


def handle() -> None:
    """Let this process's commands be ended by these signals, less those that it was started to
    ignore, as `nohup` and background jobs of a shell are."""
    _state.handling, _state.ask, _state.heard_at = True, None, -SAME_S
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def handled() -> bool:
    """Whether this process is a command, whose signals are handled here."""
    return _state.handling


@contextmanager
def on_first_signal(ask: Ask) -> Iterator[None]:
    """For the length of a `with`, the first signal calls `ask`, which returns a sentence for the
    terminal where it has asked for a stop, or None where there is nothing to save."""
    before, _state.ask = _state.ask, ask
    try:
        yield
    finally:
        _state.ask = before


@contextmanager
def kept() -> Iterator[None]:
    """Leave the handlers of signals as they are while Ray connects, and answer a SIGTERM after.

    Processes that Ray starts meanwhile are started deaf to SIGTERM, and so are theirs: a run whose
    cluster heard it too could save nothing. They end with the command, which kills them.
    """
    if not handled():
        yield
        return
    from ray._private import utils

    theirs, before, came = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM), []
    utils.set_sigterm_handler = lambda handler: None
    # Another thread may hear what this one does not.
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, before)  # Ray's C++ part sets one that dumps
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)  # one that waited is answered here
        if came:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def interrupted_as(sentence: Callable[[], str]) -> Iterator[None]:
    """An interruption inside as a StoppedError that says what the next command goes on from."""
    _state.sentences.append(sentence)
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(sentence()) from None
    finally:
        _state.sentences.pop()


def end_at_once() -> None:
    """End this process, whatever it waits for, with the sentence of an interruption. From any
    thread."""
    said = _state.sentences[-1]() if _state.sentences else UNSAVED
    with suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"{said}\n".encode())
    os._exit(1)


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    repeated, _state.heard_at = now - _state.heard_at < SAME_S, now
    if repeated:
        return
    ask, _state.ask = _state.ask, None
    if ask is not None and (sentence := ask()) is not None:
        # Straight to the terminal: a handler may have interrupted a print.
        with suppress(OSError):  # it may be gone
            os.write(2, f"{signal.Signals(number).name}: {sentence}\n".encode())
        return
    raise KeyboardInterrupt

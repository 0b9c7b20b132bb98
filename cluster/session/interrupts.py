"""SIGINT, SIGTERM and SIGHUP: all end a command in order; where a stage can save what it has done,
the first one asks it to, and only the next one ends it at once.

A launcher may send SIGTERM to every process of a job, as Slurm does, and a shell whose terminal is
gone SIGHUP. A run whose cluster heard it too could save nothing, and Ray's own handlers take the
cluster from under the command, or dump it. So every thread of a command is deaf to both, which
processes that it starts inherit, and one thread alone waits for them and passes them on.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from shared.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEAF_TO = frozenset({signal.SIGTERM, signal.SIGHUP})  # Ray sees to SIGINT where it starts a cluster
PASSED_ON = signal.SIGUSR2  # what the thread that waits for them sends to the main one
EAR = "hears signals"  # that thread's name
CONNECTING = "Ray is starting, and this command ends once it has; again, and it ends at once"
UNSAVED = "Interrupted; the same command starts again."
SAME_S = 1.0  # a launcher may send its signal twice: to the command, and to its process group

Ask = Callable[[], str | None]


@dataclass(slots=True)
class _State:
    """Of this process."""

    handling: bool = False
    passed_on: int = signal.SIGTERM  # what PASSED_ON stands for
    ask: Ask | None = None  # who is asked first
    heard_at: float = -SAME_S  # when a signal came last
    sentences: list[Callable[[], str]] = field(default_factory=list)  # of `interrupted_as`


_state = _State()


@contextmanager
def handling(*, to_the_end: bool = False) -> Iterator[None]:
    """Let this process's commands, for the length of a `with` in the main thread, be ended by these
    signals, less those that it was started to ignore, as `nohup` and background jobs of a shell
    are. With `to_the_end` the process has nothing to do after it, and ignores what comes then."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, PASSED_ON)}
    was, _state.handling, _state.ask, _state.heard_at = _state.handling, True, None, -SAME_S
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    ended = threading.Event()
    ear = threading.Thread(target=_pass_on, args=(ended,), name=EAR, daemon=True)
    ear.start()
    try:
        yield
    finally:
        ended.set()
        signal.pthread_kill(ear.ident, signal.SIGTERM)  # type: ignore[arg-type]
        ear.join()
        _state.handling = was
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


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
    """Leave the handlers of signals as they are while Ray connects, and answer a first one after:
    Ray has no order in which to end there."""
    if not handled():
        yield
        return
    from ray._private import utils

    theirs, before, came = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM), []
    utils.set_sigterm_handler = lambda handler: None
    try:
        with on_first_signal(lambda: came.append(True) or CONNECTING):
            yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, before)  # Ray's C++ part sets one that dumps
    if came:
        raise KeyboardInterrupt


@contextmanager
def hearing() -> Iterator[None]:
    """Let processes that are started in a `with` hear what a command's others are deaf to."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def _pass_on(ended: threading.Event) -> None:
    """Wait for signals and interrupt the main thread, whatever it waits for."""
    main = threading.main_thread().ident
    while (number := signal.sigwait(DEAF_TO)) and not ended.is_set():
        if signal.getsignal(number) != signal.SIG_IGN:
            _state.passed_on = number
            signal.pthread_kill(main, PASSED_ON)  # type: ignore[arg-type]


def _on_signal(number: int, frame: FrameType | None) -> None:
    number = _state.passed_on if number == PASSED_ON else number
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

"""Signals: the first asks who can save, the next ends; a doubled one counts once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster.session import interrupts
from cluster.session.interrupts import (
    SAME_S,
    SIGNALS,
    handle,
    interrupted_as,
    kept,
    on_first_signal,
)
from shared.errors import StoppedError

BLOCKED = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


@pytest.fixture(autouse=True)
def handled(monkeypatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handle()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int, *, after_s: float) -> None:
    """Send a signal to this process as if so long after the one before."""
    interrupts._state.heard_at -= after_s
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_cannot_save(number):
    with pytest.raises(KeyboardInterrupt):
        send(number, after_s=SAME_S)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_ends(number, capfd):
    asked = []
    with on_first_signal(lambda: asked.append(1) or "it is saved"):
        send(number, after_s=SAME_S)
        assert asked == [1]
        assert f"{signal.Signals(number).name}: it is saved" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(number, after_s=SAME_S)
    assert asked == [1]


def test_who_has_nothing_to_save_is_ended_at_once():
    with on_first_signal(lambda: None), pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM, after_s=SAME_S)


def test_a_signal_that_a_launcher_sends_twice_counts_once():
    asked = []
    with on_first_signal(lambda: asked.append(1) or "it is saved"):
        send(signal.SIGTERM, after_s=SAME_S)
        send(signal.SIGTERM, after_s=0)
    assert asked == [1]


def test_who_asks_is_asked_only_while_it_works():
    asked = []
    with on_first_signal(lambda: asked.append(1) or "it is saved"):
        pass
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM, after_s=SAME_S)
    assert asked == []


def test_an_interruption_says_what_goes_on():
    with (
        pytest.raises(StoppedError, match="goes on from step 3"),
        interrupted_as(lambda: "the same command goes on from step 3"),
    ):
        send(signal.SIGINT, after_s=SAME_S)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_command_was_started_to_ignore_it_ignores(number):
    signal.signal(number, signal.SIG_IGN)
    handle()
    send(number, after_s=SAME_S)
    assert signal.getsignal(number) == signal.SIG_IGN


def starts_deaf() -> bool:
    """Whether a process that is started here is deaf to SIGTERM."""
    return subprocess.check_output([sys.executable, "-c", BLOCKED], text=True) == "True\n"


@pytest.mark.parametrize(
    "heard",
    [
        lambda: None,
        # as by a thread that is older
        lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
    ],
)
def test_a_signal_while_ray_connects_is_answered_once_it_has(heard):
    connected = []

    def connect() -> None:
        with kept():
            heard()
            send(signal.SIGTERM, after_s=SAME_S)
            connected.append(True)

    with pytest.raises(KeyboardInterrupt):
        connect()
    assert connected
    assert not starts_deaf()


def test_what_ray_starts_is_deaf_to_what_the_command_answers():
    with kept():
        assert starts_deaf()
    assert not starts_deaf()

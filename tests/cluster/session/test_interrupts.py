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
    handling,
    hearing,
    interrupted_as,
    kept,
    on_first_signal,
)
from shared.errors import StoppedError
from tests import signals

BLOCKED = "import signal; print(signal.{} in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
PROGRAM = """
import atexit, os, signal, sys
from cluster.__main__ import program

def sent(*_):
    os.kill(os.getpid(), signal.{0})

class Importing:
    def find_spec(self, name, *_):
        if name == "cluster.{1}":
            sent()

atexit.register(sent)
sys.meta_path.insert(0, Importing())
sys.argv = ["tutelage", "--version"]
sys.exit(program())
"""


@pytest.fixture(autouse=True)
def handled(monkeypatch) -> Iterator[None]:
    with handling():
        yield


def send(number: int, *, after_s: float) -> None:
    """Send a signal to this process as if so long after the one before."""
    interrupts._state.heard_at -= after_s
    signals.send(number)
    time.sleep(0.1)  # another thread may hear it


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
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with handling():
            send(number, after_s=SAME_S)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_ray_connects_is_answered_once_it_has(number, capfd):
    connected = []

    def connect() -> None:
        with kept():
            send(number, after_s=SAME_S)
            connected.append(True)

    with pytest.raises(KeyboardInterrupt):
        connect()
    assert connected
    assert f"{signal.Signals(number).name}: Ray is starting" in capfd.readouterr().err


def test_a_second_signal_while_ray_connects_ends_at_once():
    def connect() -> None:
        with kept():
            send(signal.SIGTERM, after_s=SAME_S)
            send(signal.SIGTERM, after_s=SAME_S)
            raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        connect()


def test_rays_handler_of_a_signal_is_not_called():
    """One of another part stands in: what it does would end this process."""
    with kept():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(3))
        with pytest.raises(KeyboardInterrupt), on_first_signal(lambda: None):
            send(signal.SIGTERM, after_s=SAME_S)


def starts_deaf(number: signal.Signals) -> bool:
    """Whether a process that is started here is deaf to a signal."""
    command = [sys.executable, "-c", BLOCKED.format(number.name)]
    return subprocess.check_output(command, text=True) == "True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_command_starts_is_deaf_to_what_it_answers_unless_it_is_to_hear(number):
    assert starts_deaf(number)
    with hearing():
        assert not starts_deaf(number)
    assert starts_deaf(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("imported", "code"), [("cli", 1), ("nothing", 0)])
def test_the_program_answers_signals_before_it_has_a_command_and_none_after(number, imported, code):
    """In both cases another one comes when Python ends."""
    script = PROGRAM.format(number.name, imported)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr == (f"{interrupts.UNSAVED}\n" if code else "")
    assert ended.stdout.startswith("tutelage ") == (code == 0)

"""One process makes what several want; those that wait say so."""

import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from shared.locking import alone

HOLD = "import sys, time; from shared.locking import alone; from pathlib import Path\n" + (
    "with alone(Path(sys.argv[1]), making='rows'): print('held', flush=True); time.sleep(600)"
)


def test_who_comes_second_says_what_it_waits_for_and_comes_in_when_the_first_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, inside = tmp_path / "rows.lock", threading.Event()

    def enter() -> None:
        with alone(lock, making="rows of code"):
            inside.set()

    with Popen([sys.executable, "-c", HOLD, str(lock)], stdout=PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = threading.Thread(target=enter)
        second.start()
        said, until = "", time.monotonic() + 60
        while not said and time.monotonic() < until:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert not inside.is_set()
        first.kill()
    second.join(60)
    assert inside.is_set()
    assert said == f"another process makes rows of code; waiting until it has ({lock})\n"
    assert not any(capsys.readouterr())


def test_who_is_alone_says_nothing_and_leaves_the_lock_open_after_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), alone(tmp_path / "lock", making="rows"):
            raise ZeroDivisionError
    assert not any(capsys.readouterr())

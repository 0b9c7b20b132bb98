"""A teacher service in one command, a student in another, and what the first does meanwhile."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.drills.commands import Home, reached, steps_done, wait_until

pytestmark = pytest.mark.drill

FOREVER = "steps=1000000"
SECONDS = 30.0  # "within seconds", on a machine that trains on the same two cores


def units_by_replica(home: Home) -> dict[str, int]:
    """What `teacher status` says that each replica has served."""
    said = home.run("teacher", "status")
    return {name: int(n) for name, n in re.findall(r"(\S*replica-\d+)\s+alive\s+(\d+) units", said)}


def assert_goes_on(run: Path, training) -> None:
    wait_until(reached(run, steps_done(run) + 3), doing=training)


def test_a_teacher_is_scaled_while_a_student_trains(home, config, tmp_path):
    up = home.run("teacher", "up", str(config), "teachers.tiny.replicas=1")
    assert "with 1 replica" in up
    again = home.run("teacher", "up", str(config), "teachers.tiny.replicas=1")
    assert "with 1 replica" in again
    run = tmp_path / "job"
    training = home.start("train", str(config), f"paths.runs={tmp_path}", FOREVER)
    wait_until(reached(run, 3), doing=training)

    step = steps_done(run)
    home.run("teacher", "scale", "2")
    scaled = time.monotonic()
    assert steps_done(run) > step
    wait_until(lambda: min(units_by_replica(home).values()) > 0, doing=training)
    seconds = time.monotonic() - scaled
    print(f"the second replica had served {seconds:.1f} s after `scale` returned")
    assert len(units_by_replica(home)) == 2
    assert seconds < SECONDS

    asked = time.monotonic()
    home.run("teacher", "status")
    to_start_a_command = time.monotonic() - asked
    asked = time.monotonic()
    said = home.run("teacher", "scale", "500", expecting=2)
    seconds = time.monotonic() - asked
    print(f"refused after {seconds:.1f} s: {said}")
    assert re.search(r"\d+ of 498 teacher replicas do not fit: each needs 0.25 CPU", said)
    assert seconds < 10 + to_start_a_command
    assert_goes_on(run, training)

    assert "2 -> 1 replica" in home.run("teacher", "scale", "1")
    assert_goes_on(run, training)
    training.process.send_signal(signal.SIGINT)
    assert training.wait() == 1
    assert "which is saved; the same command continues" in training.output
    assert "Traceback" not in training.output

    assert "tiny is stopped" in home.run("teacher", "down")
    assert "no teacher service is running" in home.run("teacher", "status")
    assert "the cluster that `teacher up` started is stopped" in home.run(
        "teacher", "down", "--all"
    )
    assert not [" ".join(p.cmdline())[:100] for p in home.processes()]

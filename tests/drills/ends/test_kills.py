"""Processes die by SIGKILL, and the run ends as if none had, bit for bit."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.drills.commands import Command, Home, reached, steps_done, titled, wait_until
from tests.drills.conftest import ROWS_PER_STEP, STEPS, UNITS_PER_STEP, Job
from tests.drills.evidence import assert_every_row_once, assert_same, failures

STALL_S = 3.0
EARLY, LATE = 5, STEPS - 15  # a kill hits a step between these

pytestmark = pytest.mark.drill


def begin(home: Home, job: Job, runs: Path) -> Command:
    """The same command as ever, into a folder of its own."""
    return home.start("run", str(job.config), f"paths.runs={runs}")


def kill_at_a_random_step(
    run: Path, command: Command, steps: range, *, kill: Callable[[Command], None]
) -> None:
    """The same steps in every session; the one that was hit is printed."""
    step = random.Random(kill.__name__).choice(steps)
    wait_until(reached(run, step), doing=command)
    kill(command)
    print(f"killed at step {steps_done(run)}, asked for {step}")
    assert steps_done(run) < STEPS, "the run was over before it was killed"


def an_actor(command: Command, *titles: str) -> psutil.Process:
    found = titled(command.family(), *titles)
    assert found, [" ".join(p.cmdline())[:80] for p in command.family()]
    return found[0]


def busiest(processes: list[psutil.Process], run: Path, command: Command) -> psutil.Process:
    """The one that computes most during some steps; a student asks its favourite first."""
    before, step = [sum(process.cpu_times()[:2]) for process in processes], steps_done(run)
    wait_until(reached(run, step + 4), doing=command)
    spent = [sum(process.cpu_times()[:2]) for process in processes]
    return max(zip(spent, before, processes, strict=True), key=lambda each: each[0] - each[1])[2]


def wait_until_it_stalls(command: Command, run: Path) -> None:
    """No further step for some seconds: a unit is under way and is not answered."""
    seen, since = steps_done(run), time.monotonic()
    while time.monotonic() - since < STALL_S:
        assert command.running, command.output
        if (now := steps_done(run)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    assert seen < STEPS, "the run was over before the teacher was stopped"


def test_a_teacher_killed_in_mid_unit_changes_nothing(home, job, tmp_path):
    run, command = tmp_path / "job", begin(home, job, tmp_path)
    wait_until(reached(run, EARLY), doing=command)
    replica = busiest(titled(command.family(), "TeacherReplica"), run, command)
    replica.suspend()  # it keeps the unit it has begun, and every one it is sent
    wait_until_it_stalls(command, run)
    replica.kill()
    assert command.wait() == 0, command.output
    assert_same(run, job.reference)
    assert_every_row_once(run, rows_per_step=ROWS_PER_STEP, units_per_step=UNITS_PER_STEP)
    counted = failures(run)
    assert counted["teacher_restarts"] == 1
    assert counted["retried_units"] >= 1
    assert counted["student_restarts"] == 0


def test_a_whole_run_killed_twice_is_continued_by_the_same_command(home, job, tmp_path):
    run, first = tmp_path / "job", begin(home, job, tmp_path)
    kill_at_a_random_step(run, first, range(EARLY, STEPS // 3), kill=Command.kill)
    wait_until(lambda: not home.processes(), patience_s=60)  # a private cluster dies with it
    second = begin(home, job, tmp_path)
    kill_at_a_random_step(run, second, range(STEPS // 2, LATE), kill=Command.kill_everything)
    third = begin(home, job, tmp_path)
    assert third.wait() == 0, third.output
    assert "Validation text" in third.output
    assert_same(run, job.reference)
    assert not home.processes()


def test_a_controller_and_then_a_student_worker_killed_change_nothing(home, job, tmp_path):
    run, command = tmp_path / "job", begin(home, job, tmp_path)
    for title, steps in (
        ("ControllerActor", range(EARLY, STEPS // 3)),
        ("RayTrainWorker", range(STEPS // 2, LATE)),
    ):
        wait_until(reached(run, random.Random(title).choice(steps)), doing=command)
        an_actor(command, title).kill()
    assert command.wait() == 0, command.output
    assert "a student worker died" in command.output
    assert_same(run, job.reference)
    counted = failures(run)
    assert counted["student_restarts"] == 1
    assert counted["teacher_restarts"] == 0

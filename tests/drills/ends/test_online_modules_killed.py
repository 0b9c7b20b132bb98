"""A teacher whose modules learn beside the student: whoever dies, the run ends with the same
weights and the same modules, bit for bit."""

import random
from pathlib import Path

import pytest

from shared.run.run_dir import RunDir
from tests.drills.commands import Command, reached, titled, wait_until
from tests.drills.conftest import STEPS, homes
from tests.drills.ends.test_kills import EARLY, LATE, kill_at_a_random_step
from tests.drills.evidence import assert_same, failures

pytestmark = pytest.mark.drill

MODULES = (
    "teachers.tiny.online_modules={r: 4, lr: 3e-3, eta: 0.5, top_k: 16, lag: 1}",
    "baseline=false",
)


def last_version(run: Path) -> str:
    """The name of the newest version, which holds the digest of weights and moments."""
    return sorted(path.name for path in RunDir(run).modules.glob("*.safetensors"))[-1]


def test_driver_trainer_and_teachers_killed_change_nothing(home, config, tmp_path):
    runs = tmp_path / "undisturbed", tmp_path / "killed"
    for ready in homes():
        ready.run("run", str(config), f"paths.runs={runs[0]}", *MODULES)
    asked = ("run", str(config), f"paths.runs={runs[1]}", *MODULES)
    run, first = runs[1] / "job", home.start(*asked)
    kill_at_a_random_step(run, first, range(EARLY, STEPS // 4), kill=Command.kill_everything)
    second = home.start(*asked)
    for title, steps in (
        ("RayTrainWorker", range(STEPS // 4, STEPS // 3)),
        ("TeacherReplica", range(STEPS // 3, STEPS // 2)),
        ("TeacherReplica", range(STEPS // 2, LATE - 5)),  # the one that was not started again
    ):
        wait_until(reached(run, random.Random(str(steps)).choice(steps)), doing=second)
        min(titled(second.family(), title), key=lambda found: found.create_time()).kill()
    assert second.wait() == 0, second.output
    assert_same(run, runs[0] / "job")
    assert last_version(run) == last_version(runs[0] / "job")
    counted = failures(run)
    assert (counted["student_restarts"], counted["teacher_restarts"]) == (1, 2)

"""A student that writes its own text, beside what its teacher writes: whoever dies, the run ends
with the same weights, bit for bit."""

import os
import random
import shutil
from pathlib import Path

import pytest

from shared.run.metrics import read_metrics
from tests.drills.commands import Command, Home, reached, titled, wait_until
from tests.drills.conftest import STEPS, homes
from tests.drills.ends.test_kills import EARLY, LATE, kill_at_a_random_step
from tests.drills.evidence import assert_same, failures

pytestmark = pytest.mark.drill

OWN = (
    "source={student: 0.5, dataset: 0.25, teacher: 0.25, max_new_tokens: 12, prompt_tokens: 6}",
    "baseline=false",
)


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, without a store."""
    runs = tmp_path_factory.mktemp("rollouts")
    for home in homes():
        home.run("run", str(config), f"paths.runs={runs}", *OWN)
    return runs / "job"


def begin(home: Home, config: Path, runs: Path, *more: str) -> Command:
    return home.start("run", str(config), f"paths.runs={runs}", *OWN, *more)


def test_driver_trainer_and_teacher_killed_change_no_weight(home, config, reference, tmp_path):
    run, first = tmp_path / "job", begin(home, config, tmp_path)
    kill_at_a_random_step(run, first, range(EARLY, STEPS // 4), kill=Command.kill_everything)
    second = begin(home, config, tmp_path)
    for title, steps in (
        ("RayTrainWorker", range(STEPS // 3, STEPS // 2)),
        ("TeacherReplica", range(STEPS // 2, LATE)),
    ):
        wait_until(reached(run, random.Random(title).choice(steps)), doing=second)
        titled(second.family(), title)[0].kill()
    assert second.wait() == 0, second.output
    assert_same(run, reference)
    assert failures(run)["student_restarts"] == 1
    lines = read_metrics(run / "metrics.jsonl")
    assert all(line.rollouts.rollouts for line in lines)
    assert sum(line.texts.texts for line in lines)


def test_a_cold_and_a_warm_store_change_nothing(home, config, reference, tmp_path):
    """Answers about what the student wrote are found again under its content."""
    store, runs = tmp_path / "store", tmp_path / "runs"
    cold = begin(home, config, runs, f"targets.store={store}")
    assert cold.wait() == 0, cold.output
    assert_same(runs / "job", reference)
    shutil.rmtree(runs / "job")
    warm = begin(home, config, runs, f"targets.store={store}")
    assert warm.wait() == 0, warm.output
    assert_same(runs / "job", reference)
    hits = sum(line.cache_hits for line in read_metrics(runs / "job" / "metrics.jsonl"))
    assert hits > 0, os.listdir(store)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_copy_of_the_student_killed_changes_no_weight(home, config, tmp_path, lag):
    """Whoever of those that answer is killed, teachers and copies one after the other; the run
    that nobody disturbed is written by the workers themselves."""
    own = f"source={{student: 0.5, dataset: 0.5, max_new_tokens: 12, prompt_tokens: 6, lag: {lag}}}"
    runs = tmp_path / "undisturbed", tmp_path / "killed"
    for ready in homes():
        ready.run("run", str(config), f"paths.runs={runs[0]}", own, "baseline=false")
    copies = "rollouts={replicas: 1, cpus: 0.25}"
    command = home.start("run", str(config), f"paths.runs={runs[1]}", own, "baseline=false", copies)
    run = runs[1] / "job"
    wait_until(reached(run, EARLY), doing=command)
    replicas = titled(command.family(), "TeacherReplica")
    assert len(replicas) == 3
    for number, replica in enumerate(replicas):
        wait_until(reached(run, EARLY + 8 * (number + 1)), doing=command)
        replica.kill()
    assert command.wait() == 0, command.output
    assert_same(run, runs[0] / "job")
    counted = failures(run)
    assert counted["teacher_restarts"] == 2
    assert counted["rollout_restarts"] == 1
    assert counted["student_restarts"] == 0
    assert not home.processes()


COPY = "rollouts={replicas: 1, cpus: 0.25}"
TEXTS = "max_new_tokens: 12, prompt_tokens: 6"
# What a run is asked, and with whom that writes; the run that nobody disturbed has no copies.
WAYS = {
    "updates": [
        f"source={{student: 0.5, dataset: 0.5, updates: 3, lag: 2, {TEXTS}}}",
        "mixture={policy: fixed}",
        "losses=[{kind: policy_gradient, credit: return, clip: 0.2}]",
        COPY,
    ],
    "adaptive": [
        "source={adaptive: {every: 5, start: 0.4, growth: 0.2, tolerance: 0.0, replay_rows: 8}, "
        f"lag: 2, {TEXTS}}}",
        COPY,
    ],
    "mixed": [f"source={{student: 0.5, dataset: 0.5, teacher_mix: 0.3, {TEXTS}}}"],
    "followed": [
        f"source={{student: 0.5, dataset: 0.5, lag: 1, {TEXTS}}}",
        "teachers.tiny.follow_student={lag: 3, every: 2}",
        COPY,
    ],
}


@pytest.mark.parametrize("name", WAYS)
def test_driver_trainer_and_all_who_answer_killed_change_no_weight(
    home, config, tiny_pair, tmp_path, name
):
    """Whatever way a student writes, and where its teacher is itself."""
    asked = [*WAYS[name], "steps=30", "checkpoints.every=6", "baseline=false"]
    if name == "followed":
        asked.append(f"teachers.tiny.model={tiny_pair.student}")
    runs = tmp_path / "undisturbed", tmp_path / "killed"
    for ready in homes():
        alone = [option for option in asked if option != COPY]
        ready.run("run", str(config), f"paths.runs={runs[0]}", *alone)
    run, killed = runs[1] / "job", ("run", str(config), f"paths.runs={runs[1]}", *asked)
    first = home.start(*killed)
    kill_at_a_random_step(run, first, range(EARLY, 9), kill=Command.kill_everything)
    second = home.start(*killed)
    for step, title in ((12, "TeacherReplica"), (16, "RayTrainWorker"), (20, "TeacherReplica")):
        wait_until(reached(run, step), doing=second)
        max(titled(second.family(), title), key=lambda found: found.create_time()).kill()
    assert second.wait() == 0, second.output
    assert_same(run, runs[0] / "job")
    counted = failures(run)
    assert counted["student_restarts"] == 1
    assert counted["teacher_restarts"] + counted["rollout_restarts"] == 2
    assert not home.processes()

"""A teacher whose modules learn beside the student: on time, the same after a kill and on any
number of replicas, and plain distillation where they are frozen."""

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.config.models.modules import TrainedModules
from shared.data.rows import Rows
from shared.errors import CheckpointError, NonFiniteLossError, TeacherError, TutelageError
from shared.prompts.prefix import Opening
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.lessons import Learnt, Lesson
from shared.targets.question import Question
from shared.targets.weights import WeightsRef
from student_trainer.sources.batches import Step
from student_trainer.sources.online_teacher import OnlineTeacher
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, final_weights, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, with_states
from tests.teacher_service.scripted import make_rows
from tests.telling import asked, telling

FAST = {"r": 4, "lr": 0.01, "eta": 0.5, "top_k": 8}
LORA = {"train": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.3}}
# Killed after the checkpoint at step 2 of 4, and gone on from there.
RESUMED = {
    "lag-0": {
        "online_modules": {"lag": 0},
        "targets": {"student_ids": 4},
        "losses": [{"kind": "reverse_kl"}],
    },
    "lag-1": {"online_modules": {"lag": 1}},
    "lag-2": {"online_modules": {"lag": 2}, "student": LORA | {"zero": 3}},
}
ALONE = {"student": {"workers": 1}, "checkpoints": {"every": 100}}
# On one rank, as the reference, but for what is named.
VARIANTS = {
    "reference": {},
    "plain": {"online_modules": None},
    "frozen": {"online_modules": {"lr": 0.0, "eta": 0.0}},
    "frozen-looking": {"online_modules": {"lr": 0.0}},
    "replicas": {"replicas": 2},
    "labels-alone": {"online_modules": {"eta": 0.0}},
    "fewer-ids": {"online_modules": {"top_k": 2}},
    "strict": {"online_modules": {"lag": 0}},
}


def taught_plan(folder: Path, pair: tiny.Pair, domains, **options: Any) -> RunPlan:
    asked = options.pop("online_modules", {})
    modules = None if asked is None else FAST | asked
    teacher = {"online_modules": modules, "replicas": options.pop("replicas", 1)}
    teachers = {"t": {"model": str(pair.teacher), **teacher}}
    plan = plan_of(folder, pair, domains, teachers=teachers, **{"log_every": 1, **options})
    mark_exported(plan)
    return plan


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs, alone = [], []
    for name in asked(request, "name", among=RESUMED, always=("lag-1",)):
        plan = taught_plan(folder / name, *material, **RESUMED[name])
        jobs.append(as_job("resumed", plan, at=2))
    for name, options in VARIANTS.items():
        options = ALONE | options
        alone.append(as_job("train", taught_plan(folder / name, *material, **options)))
    states = taught_plan(folder / "states", *material, **ALONE)
    alone.append(as_job("train", with_states(states, folder / "cache")))
    run_jobs(jobs, folder / "jobs")
    run_jobs(alone, folder / "jobs-alone", ranks=1)
    return folder


def versions(run: Path) -> list[int]:
    """Those whose files are kept."""
    names = (path.name for path in RunDir(run).modules.glob("*.safetensors"))
    return sorted(int(name.split(".")[0].removeprefix("version-")) for name in names)


def digests(run: Path) -> list[str]:
    return sorted(path.name for path in RunDir(run).modules.glob("*.safetensors"))[-1:]


@pytest.mark.parametrize("name", telling(RESUMED, "lag-0", "lag-1"))
def test_a_killed_run_ends_with_the_same_weights_and_modules(runs: Path, name: str):
    run = runs / name
    again = run.with_name(f"{run.name}-resumed")
    assert same_weights(run, again)
    assert digests(run) == digests(again)
    assert comparable_lines(run)[2:] == comparable_lines(again)[-2:]


@pytest.mark.parametrize("name", ["frozen", "frozen-looking"])
def test_frozen_modules_are_plain_distillation_bit_for_bit(runs: Path, name: str):
    assert same_weights(runs / "plain", runs / name)
    plain, frozen = (comparable_lines(runs / run) for run in ("plain", name))
    for line, other in zip(plain, frozen, strict=True):
        assert line.pop("modules") is None
        assert other.pop("modules") is not None
        assert line == other


def test_several_replicas_teach_as_one_does(runs: Path):
    assert same_weights(runs / "reference", runs / "replicas")
    assert digests(runs / "reference") == digests(runs / "replicas")


def test_one_rank_and_two_are_taught_alike(runs: Path):
    weights, others = final_weights(runs / "reference"), final_weights(runs / "lag-1")
    for key, weight in weights.items():
        assert weight.numpy() == pytest.approx(others[key].numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "labels-alone", "fewer-ids", "strict"])
def test_what_modules_learn_changes_what_the_student_learns(runs: Path, name: str):
    assert not same_weights(runs / "reference", runs / name)


def test_a_line_says_what_the_modules_learnt(runs: Path):
    lines = [line.modules for line in read_metrics(runs / "reference" / "metrics.jsonl")]
    assert [line and line.version for line in lines] == [1, 2, 3, 4]
    assert all(line and line.nll > 0 and (line.student_kl or 0) > 0 for line in lines)
    alone = [line.modules for line in read_metrics(runs / "labels-alone" / "metrics.jsonl")]
    assert [line and line.student_kl for line in alone] == [None] * 4
    pairs = [(one.nll, other.nll) for one, other in zip(lines, alone, strict=True) if one and other]
    assert [one == other for one, other in pairs] == [True, False, False, False]


def test_last_states_are_those_of_a_version_too(runs: Path):
    assert read_metrics(runs / "states" / "metrics.jsonl")[-1].modules is not None
    assert versions(runs / "states")


def test_versions_stay_as_long_as_a_checkpoint_names_them(runs: Path):
    """Checkpoints are at steps 2 and 4 and the lag is 1; the last lesson makes version 4."""
    assert versions(runs / "lag-1") == [1, 2, 3, 4]
    assert versions(runs / "reference") == [2, 3, 4]


def test_a_checkpoint_of_other_modules_is_refused(runs: Path, material, tmp_path: Path):
    plan = taught_plan(runs / "lag-1", *material, online_modules={"lag": 1, "eta": 0.1}, steps=6)
    mark_exported(plan, step=4)
    run_jobs([as_job("train", plan)], tmp_path)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["error"] == CheckpointError.__name__
    assert "was written with the teacher's modules" in result["message"]


class Alone:
    """The ranks of a run with one."""

    leads = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, error: TutelageError | None) -> None:
        if error is not None:
            raise error

    def from_leader(self, value: Any) -> Any:
        return value


class Recorded:
    """A `ModuleTrainer` that writes down what it is asked and answers late, or with an error."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.lessons: list[Lesson] = []
        self.answered, self.fails_at = 0, fails_at
        self._waiting: deque[tuple[Rows, Lesson]] = deque()

    def submit(self, rows: Rows, lesson: Lesson) -> None:
        self.lessons.append(lesson)
        self._waiting.append((rows, lesson))

    def next(self) -> Learnt:
        rows, lesson = self._waiting.popleft()
        self.answered += 1
        if lesson.modules.version == self.fails_at:
            raise TeacherError("it is gone")
        ref = WeightsRef(lesson.modules.version + 1, f"{lesson.modules.version + 1:032x}")
        return Learnt.build(rows, ref, fingerprint={}, nll=1.0, kl=2.0)

    def close(self) -> None:
        self._waiting.clear()


def online(folder: Path, trainer: Recorded, lag: int) -> OnlineTeacher:
    anything: Any = SimpleNamespace()
    asked, ranks = TrainedModules(eta=0.0), Alone()
    ask, files = LikeliestIds(4, 100), RunDir(folder)
    return OnlineTeacher(asked, lag, ask, anything, anything, ranks, files, {}, trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_step_s_is_answered_by_version_s_minus_lag_and_no_lesson_is_waited_for_earlier(
    tmp_path: Path, lag: int
):
    trainer = Recorded()
    teacher, question = online(tmp_path, trainer, lag), Question(LikeliestIds(4, 100))
    rows: Any = make_rows([[5]])
    asked = 0
    for step in range(6):
        for ahead in range(asked, step + lag + 1):
            found = teacher.question(question, ahead).weights
            assert found is not None
            assert found.version == max(0, ahead - lag)
            asked = ahead + 1
        assert trainer.answered == step
        teacher.teach(Step(step, (rows, rows), rows, rows))
        assert trainer.lessons[-1] == Lesson(
            WeightsRef(step, f"{step:032x}" if step else ""), (1, 1)
        )
    resumed = online(tmp_path, Recorded(), lag)
    resumed.restore(json.loads(json.dumps(teacher.state())))
    for step in range(6, 7 + lag):
        assert resumed.question(question, step) == teacher.question(question, step)
    assert resumed.take_line() == teacher.take_line()


def test_units_of_several_draws_are_one_lesson_after_prompts_too(tmp_path: Path):
    """As where an epoch ends within a step."""
    teacher, rows = online(tmp_path, Recorded(), 0), make_rows([[5]])
    opening = Opening(np.zeros(0, np.int32), np.array([7, 8], np.int32))
    teacher.openings = dict.fromkeys(rows.domains(), opening)
    units = tuple(rows.with_draws(np.array([draw])) for draw in (0, 1))
    teacher.teach(Step(0, units, rows, rows))  # type: ignore[arg-type]
    assert teacher.question(Question(LikeliestIds(4, 100)), 1).weights == WeightsRef(1, f"{1:032x}")


class Broken:
    """An engine whose student gives no numbers, for its likeliest id and all others."""

    training = True

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def __call__(self, rows: Rows, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        size = int(rows.num_loss_tokens().sum())
        return torch.zeros(size, 1, dtype=torch.int64), torch.full((size, 2), torch.nan)


def test_a_student_without_numbers_is_named_before_it_teaches(tmp_path: Path):
    """And not the modules, which would have a loss that is none."""
    trainer = Recorded()
    teacher, rows = online(tmp_path, trainer, 0), make_rows([[5]])
    teacher.asked, teacher.engine = TrainedModules(eta=0.5), Broken()
    teacher.layouts = SimpleNamespace(batch=lambda rows: rows)  # type: ignore[assignment]
    with pytest.raises(NonFiniteLossError, match="student's log-probabilities before step 1"):
        teacher.teach(Step(0, (rows,), rows, rows))  # type: ignore[arg-type]
    assert not trainer.lessons


def test_a_lesson_that_fails_ends_the_run_with_its_cause(tmp_path: Path):
    teacher, rows = online(tmp_path, Recorded(fails_at=1), 0), make_rows([[5]])
    for step in range(2):
        teacher.teach(Step(step, (rows,), rows, rows))  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="it is gone"):
        teacher.question(Question(LikeliestIds(4, 100)), 2)

"""A teacher that is the student some steps ago: the one that its config names, the same after a
kill, on any number of ranks and replicas."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import CheckpointError, DamagedError, EngineError, TeacherError
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from teacher_service.engine import weights
from teacher_service.engine.following import FollowingEngine
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, final_weights, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job, followers
from tests.student_trainer.runs import mark_exported, plan_of
from tests.student_trainer.sources.generated.test_rollouts import ENDS
from tests.teacher_service.scripted import make_rows
from tests.telling import asked, telling

LOSSES = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]
LORA = {"train": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.3}}
WRITES = {"student": 0.5, "dataset": 0.5, "max_new_tokens": 8, "prompt_tokens": 6, "lag": 1}
# Killed after the checkpoint at step 2 of 4, and gone on from there.
RESUMED = {
    "whole": {"follow_student": {"lag": 1}},
    "sharded": {"follow_student": {"lag": 2}, "student": LORA | {"zero": 3}},
    "in-turns": {"follow_student": {"lag": 0, "every": 3}, "student": LORA},
    "writes": {"follow_student": {"lag": 1}, "source": WRITES, "losses": [{"kind": "reverse_kl"}]},
}
KEPT = {"whole": [1, 2, 3], "sharded": [0, 1, 2, 3], "in-turns": [0, 3]}  # versions, at the end
ALONE = {"student": {"workers": 1}, "losses": LOSSES}
# On one rank; the step of each line of which the teacher is the student itself.
SAME_AT = {
    "now": ({"follow_student": {"lag": 0}}, [1, 2, 3, 4]),
    "one-ago": ({"follow_student": {"lag": 1}}, [1]),
    "every-other": ({"follow_student": {"lag": 0, "every": 2}}, [1, 3]),
    "start": ({"follow_student": {"lag": 9}}, [1]),
}


def followed_plan(folder: Path, pair: tiny.Pair, domains, **options: Any) -> RunPlan:
    teacher = {"model": str(pair.student), "follow_student": options.pop("follow_student")}
    teachers = {"t": teacher | {"replicas": options.pop("replicas", 1)}}
    plan = plan_of(folder, pair, domains, teachers=teachers, **{"log_every": 1, **options})
    plan = replace(plan, ends=ENDS) if "source" in options else plan
    mark_exported(plan)
    return plan


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs, alone = [], []
    for name in asked(request, "name", among=RESUMED, always=("whole", "sharded")):
        plan = followed_plan(folder / name, *material, **RESUMED[name])
        jobs.append(as_job("resumed", plan, at=2))
    for name, (options, _) in SAME_AT.items():
        plan = followed_plan(folder / name, *material, **options, **ALONE)
        alone.append(as_job("train", plan))
    options = {"follow_student": {"lag": 1}, "replicas": 2, **ALONE}
    alone.append(as_job("train", followed_plan(folder / "replicas", *material, **options)))
    plain = plan_of(
        folder / "plain",
        replace(material[0], teacher=material[0].student),
        material[1],
        **{"log_every": 1, **ALONE},
    )
    mark_exported(plain)
    alone.append(as_job("train", plain))
    run_jobs(jobs, folder / "jobs")
    run_jobs(alone, folder / "jobs-alone", ranks=1)
    return folder


def versions(run: Path) -> list[int]:
    names = (path.stem for path in RunDir(run).followed.glob("*.safetensors"))
    return sorted(int(name.removeprefix("version-")) for name in names)


@pytest.mark.parametrize("name", telling(RESUMED, "whole", "sharded"))
def test_a_killed_run_ends_with_the_same_weights(runs: Path, name: str):
    again = runs / f"{name}-resumed"
    assert same_weights(runs / name, again)
    assert comparable_lines(runs / name)[2:] == comparable_lines(again)[-2:]


@pytest.mark.parametrize("name", SAME_AT)
def test_a_student_differs_from_what_it_was_and_not_from_what_it_is(runs: Path, name: str):
    kl = [line.terms["forward_kl"] for line in read_metrics(runs / name / "metrics.jsonl")]
    same = [step for step, value in enumerate(kl, start=1) if abs(value) < 1e-6]
    assert same == SAME_AT[name][1], kl


def test_the_student_as_it_started_is_a_teacher_of_its_model(runs: Path):
    assert same_weights(runs / "plain", runs / "start")
    assert not same_weights(runs / "plain", runs / "one-ago")


def test_several_replicas_follow_as_one_does(runs: Path):
    assert same_weights(runs / "one-ago", runs / "replicas")


@pytest.mark.parametrize("name", telling(KEPT, "whole", "sharded"))
def test_versions_stay_as_long_as_a_checkpoint_names_them(runs: Path, name: str):
    """Checkpoints are at steps 2 and 4, and no step begins after the fourth."""
    assert versions(runs / name) == KEPT[name]


def test_adapters_alone_are_kept_where_adapters_alone_train(runs: Path):
    names = set(load_file(WeightFiles(RunDir(runs / "sharded").followed).path(3)))
    assert names
    assert all("lora_" in name for name in names)


def test_a_checkpoint_of_another_lag_is_refused(runs: Path, material, tmp_path: Path):
    plan = followed_plan(runs / "whole", *material, follow_student={"lag": 2}, steps=6)
    mark_exported(plan, step=4)
    run_jobs([as_job("train", plan)], tmp_path)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["error"] == CheckpointError.__name__
    assert "was written with the student that teaches" in result["message"]


@pytest.fixture(params=["whole", "sharded"])
def replica(runs: Path, material, request) -> tuple[FollowingEngine, WeightsRef, RunPlan]:
    options = RESUMED[request.param]
    plan = followed_plan(runs / request.param, *material, **options)
    (engine,) = followers(plan, 1)
    ref = WeightsRef(3, WeightFiles(RunDir(Path(plan.run_dir)).followed).digest(3))
    return engine, ref, plan  # type: ignore[return-value]


ROWS = make_rows([[5, 9, 11, 7, 30]])


def test_an_engine_answers_as_it_was_loaded_whatever_it_answered_before(replica, material):
    """Bit for bit; and with a version as that version."""
    engine, ref, plan = replica
    question = plan.training_question
    plain = HFEngine.load(str(material[0].student)).score(ROWS, question).arrays()
    found = [engine.score(ROWS, replace(question, weights=asked)) for asked in (None, ref, None)]
    said = [answer.arrays().label_logprob_N for answer in found]
    assert np.array_equal(said[0], plain.label_logprob_N)
    assert np.array_equal(said[2], plain.label_logprob_N)
    assert np.abs(said[1] - said[0]).max() > 1e-3


def test_what_is_not_the_version_asked_for_answers_nothing(replica, monkeypatch):
    engine, ref, plan = replica
    monkeypatch.setattr(weights, "ARRIVAL_S", 0.0)
    question = plan.training_question
    with pytest.raises(TeacherError, match=r"version 9 .* was not seen in .* another version"):
        engine.score(ROWS, replace(question, weights=WeightsRef(9, ref.digest)))
    with pytest.raises(DamagedError, match=r"is not what was pushed as version 3"):
        engine.score(ROWS, replace(question, weights=WeightsRef(3, "0" * 32)))


def test_weights_that_do_not_give_what_the_student_had_of_them_are_refused(replica, tmp_path):
    engine, ref, plan = replica
    files, other = engine._files, WeightFiles(tmp_path)
    path, expected = weights.arrived(files, ref)
    expected["logprobs"][0] += 0.01
    save_file(load_file(path), other.path(3), metadata={CANARY: json.dumps(expected)})
    question = plan.training_question
    changed = replace(question, weights=WeightsRef(3, other.digest(3)))
    engine._files = other
    with pytest.raises(EngineError, match=r"weights of version 3, .* off those of the student"):
        engine.score(ROWS, changed)
    engine._files = files
    again = engine.score(ROWS, replace(question, weights=ref))
    assert np.isfinite(again.arrays().label_logprob_N).all()


def test_one_rank_and_two_are_taught_alike(runs: Path, folder: Path, material):
    options = RESUMED["whole"] | {"student": {"workers": 1}}
    plan = followed_plan(folder / "alone", *material, **options)
    run_jobs([as_job("train", plan)], folder / "jobs-one", ranks=1)
    others = final_weights(runs / "whole")
    for key, weight in final_weights(folder / "alone").items():
        assert torch.allclose(weight, others[key], atol=1e-4)

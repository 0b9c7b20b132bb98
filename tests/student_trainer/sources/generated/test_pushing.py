"""Copies of the student that write with versions of its weights: the same run to the bit, and none
that writes with other weights than it was given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.rollouts.engine import StudentEngine, load_engine
from shared.errors import ConfigError, DamagedError, EngineError, TeacherError
from shared.run.run_dir import RunDir
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.weights import WeightFiles, WeightsRef
from student_trainer.sources.generated.pushing import Pusher, Versioned
from teacher_service.engine import weights
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.sources.generated.test_rollouts import (
    LORA,
    files,
    lines,
    texts,
    written_plan,
)
from tests.telling import asked, telling

ONE = {"rollouts": {"replicas": 1}}
# Killed after the checkpoint at step 2 of 4, and gone on from there, with a copy that writes.
RUNS = {
    "whole": {"source": {"lag": 1}},
    "strict": {
        "source": {"student": 1.0, "dataset": 0.0, "lag": 0},
        "student": {"zero": 0},
        "losses": [{"kind": "policy_gradient", "credit": "later_mean", "clip": 0.2}],
    },
    "adapters": {"source": {"lag": 2, "batch_rows": 2}, "student": LORA | {"zero": 3}},
}

each = pytest.mark.parametrize("name", telling(RUNS, "whole", "adapters"))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, folder: Path, material) -> Path:
    jobs = []
    for name in asked(request, "name", among=RUNS, always=("whole", "adapters")):
        options = RUNS[name]
        jobs.append(as_job("train", written_plan(folder / "own" / name, *material, **options)))
        plan = written_plan(folder / "copies" / name, *material, **options, **ONE)
        jobs.append(as_job("resumed", plan, at=2))
    run_jobs(jobs, folder / "jobs")
    return folder


@each
def test_a_copy_that_writes_gives_the_run_of_ranks_that_write(runs: Path, name: str):
    own = runs / "own" / name
    for other in (runs / "copies" / name, runs / "copies" / f"{name}-resumed"):
        assert same_weights(own, other)
    for step in (2, 3):
        assert texts(own, step) == texts(runs / "copies" / name, step)
    assert len(files(runs / "copies" / name, 3)) == 2


@each
def test_metrics_are_those_of_ranks_that_write(runs: Path, name: str):
    own, copies = (runs / who / name for who in ("own", "copies"))
    for line, other in zip(*map(comparable_lines, (own, copies)), strict=True):
        # A worker under ZeRO-3 multiplies by frozen weights, which may round otherwise.
        ratios = [one["rollouts"].pop("importance_ratio") for one in (line, other)]
        assert ratios[0] == pytest.approx(ratios[1], abs=1e-6 if name == "adapters" else 0)
        assert line == other
    again = comparable_lines(copies.with_name(f"{name}-resumed"))
    assert comparable_lines(copies)[2:] == again[-2:]
    assert max(line.pushed_bytes for line in lines(copies)) > 0
    assert not any(line.pushed_bytes for line in lines(own))


def test_adapters_alone_are_pushed_where_adapters_alone_train(runs: Path):
    files = {name: runs / "copies" / name / "weights" for name in ("whole", "adapters")}
    adapters = [set(load_file(path)) for path in files["adapters"].glob("*.safetensors")]
    assert adapters
    assert all("lora_" in name for names in adapters for name in names)
    size = {n: sum(p.stat().st_size for p in f.glob("*.safetensors")) for n, f in files.items()}
    assert (
        max(line.pushed_bytes for line in lines(runs / "copies" / "adapters")) * 2 < size["whole"]
    )


@each
def test_as_many_versions_are_kept_as_steps_under_way_name(runs: Path, name: str):
    kept = sorted((runs / "copies" / name / "weights").glob("*.safetensors"))
    versions = [int(path.stem.removeprefix("version-")) for path in kept]
    lag = RUNS[name]["source"]["lag"]
    # The last step learns, and its weights write what a run of more steps would learn after it.
    assert versions == list(range(3 - lag, 4))


def test_what_a_checkpoint_waits_for_is_time_of_training(folder: Path, material):
    options: dict = {"source": {"lag": 1}, "checkpoints": {"every": 1}, "steps": 3, **ONE}
    plan = written_plan(folder / "slow", *material, **options)
    run_jobs([as_job("slowed", plan, delay_s=1.0)], folder / "jobs-slow")
    waited = [(line.writing_wait_s or 0.0, line.seconds) for line in lines(folder / "slow")]
    assert len(waited) == 3
    assert waited[0][0] >= 1.0  # nothing is learnt before the first block
    assert all(wait_s <= seconds for wait_s, seconds in waited), waited


@pytest.fixture(scope="module")
def copy(runs: Path, material) -> tuple[StudentEngine, WeightsRef]:
    """A copy of the whole run's student, and the last version that was pushed to it."""
    plan = written_plan(runs / "other", *material, **RUNS["whole"], **ONE)
    folder = RunDir(runs / "copies" / "whole").weights
    version = max(int(path.stem.removeprefix("version-")) for path in folder.glob("*.safetensors"))
    ref = WeightsRef(version, WeightFiles(folder).digest(version))
    return load_engine(plan.config, str(folder)), ref


SPEC = GenerationSpec(max_new_tokens=6, temperature=1.0, seed=5, logprobs=True)
OPENINGS = Openings.build(names=["a", "b"], input_ids=[[5, 9, 11], [7, 30, 31, 32]])


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_versions_that_steps_under_way_name_may_write_yet(lag: int):
    """Those older by at most the lag, each pushed once."""
    pushed: list[int] = []

    class Names:
        level = 1e-3

        def put(self, version: int, *, is_needed: Callable[[int], bool]):
            pushed.append(version)
            assert [v for v in range(6) if is_needed(v)] == [*range(max(0, version - lag), 6)]
            return WeightsRef(version, "a"), np.zeros(1)

    versions: Any = Names()
    pusher = Pusher(cast(Any, None), versions, lag)  # nobody is asked
    for version in (0, 1, 2, 2, 3):
        pusher.prepare(version)
    assert pushed == [0, 1, 2, 3]
    for version in range(3 - lag, 4):
        with pusher.at(version) as generator:
            assert cast(Versioned, generator).weights.version == version
    with pytest.raises(KeyError), pusher.at(2 - lag):
        pass


def test_a_rollout_for_another_version_is_refused(copy, monkeypatch):
    monkeypatch.setattr(weights, "ARRIVAL_S", 0.0)
    engine, ref = copy
    answer = engine.generate(OPENINGS, replace(SPEC, weights=ref))
    answer.check(OPENINGS, replace(SPEC, weights=ref), engine.describe().fingerprint)
    other = replace(SPEC, weights=WeightsRef(ref.version + 1, ref.digest))
    with pytest.raises(TeacherError, match=rf"with weights of version {ref.version}, asked was"):
        answer.check(OPENINGS, other)
    with pytest.raises(TeacherError, match=rf"version {ref.version + 1} .* was not seen in"):
        engine.generate(OPENINGS, other)
    with pytest.raises(ConfigError, match="without a version"):
        engine.generate(OPENINGS, SPEC)


def test_a_file_that_is_not_what_was_pushed_is_refused(copy, tmp_path):
    engine, ref = copy
    path = engine._files.path(ref.version)
    before = path.read_bytes()
    engine._weights = None
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(DamagedError, match=r"is not what was pushed as version .* digest"):
            engine.generate(OPENINGS, replace(SPEC, weights=ref))
    finally:
        path.write_bytes(before)
    assert DamagedError.exit_code == 2


def differently(parameter: torch.Tensor) -> None:
    parameter.mul_(1.5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (differently, "nats off those of the student itself"),
        (torch.Tensor.zero_, "as if it had no weights"),
    ],
    ids=["other-weights", "no-weights"],
)
def test_a_copy_that_ignores_the_push_stops_the_run(copy, spoil: Callable, said: str):
    engine, ref = copy
    good = engine.generate(OPENINGS, replace(SPEC, weights=ref))
    asked = Versioned(engine, ref, good.canaries()[0], 1e-3)
    again = asked.generate(OPENINGS, SPEC).written()
    assert all(map(np.array_equal, again, good.written()))
    kept = {
        name: parameter.detach().clone()
        for name, parameter in engine._model._model.named_parameters()
    }
    try:
        with torch.no_grad():
            for parameter in engine._model._model.parameters():
                spoil(parameter)
        with pytest.raises(EngineError, match=said):
            asked.generate(OPENINGS, SPEC)
    finally:
        engine._model._model.load_state_dict(kept, strict=False)  # a tied weight has one name


def test_a_copy_of_a_student_whose_head_begins_with_zeros_writes(copy):
    engine, ref = copy
    good = engine.generate(OPENINGS, replace(SPEC, weights=ref))
    (own_T, *_) = good.canaries()
    head = engine._model._model.get_output_embeddings()
    kept = {n: p.detach().clone() for n, p in engine._model._model.named_parameters()}
    flat_T = np.full_like(own_T, -np.log(tiny.VOCAB))
    try:
        torch.nn.init.zeros_(head.weight)
        Versioned(engine, ref, flat_T, 1e-3).generate(OPENINGS, SPEC)
        with pytest.raises(EngineError, match="as if it had no weights"):
            Versioned(engine, ref, own_T, 1e-3).generate(OPENINGS, SPEC)
    finally:
        engine._model._model.load_state_dict(kept, strict=False)

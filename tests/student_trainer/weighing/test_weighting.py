"""Weightings in training: against dense float64, and through real runs however they are cut.

N positions with loss of the step   V vocabulary
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config.weighting import LLKD
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from student_trainer.weighing.llkd import LLKDWeighting
from student_trainer.weighing.weigher import Look
from student_trainer.weighing.weighting import PositionWeights, Seen, StepMeans, Weighting
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains
from tests.student_trainer.weighing.test_weigher import (
    LAYOUTS,
    Dense,
    Learnt,
    check,
    cut_of,
    every_cut,
    objective_of,
)
from tests.telling import asked, telling

LOSSES = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}]


@pytest.fixture(scope="module")
def teacher(tiny_pair: tiny.Pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


def learnt(folder: Path, pair: tiny.Pair, cut: list, weighting: Weighting) -> Learnt:
    """A step of one rank, its loss a mean over tokens."""
    objective = objective_of(folder, pair, LOSSES)
    tokens, losses = sum(int(rows.num_loss_tokens().sum()) for rows, _ in cut), []
    for rows, answer in cut:
        batch = LAYOUTS.batch(rows, answer)
        loss, _, weighted_N = objective(batch, multiplier=1 / tokens, weighting=weighting)
        assert weighted_N.sum().item() / tokens == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
        loss.backward()
        losses.append(loss.item())
    parameters = objective.student.named_parameters()
    gradient = {name: p.grad for name, p in parameters if p.grad is not None}
    return Learnt(sum(losses), gradient, {})


@every_cut
def test_llkd_in_training_equals_dense_float64_without_a_gradient_through_weights(
    tmp_path: Path, tiny_pair: tiny.Pair, teacher: HFEngine, cut: str
) -> None:
    weighting = LLKDWeighting(LLKD(confidence=0.9, uncertainty=0.999), num_domains=2)
    dense = Dense.of(tiny_pair)
    p_N, q_N = (x.gather(1, dense.label_N1)[:, 0] for x in (dense.log_p_NV, dense.log_q_NV))
    confidence_N = p_N.exp()
    entropy_N = -(dense.log_q_NV.exp() * dense.log_q_NV).sum(-1).detach()
    uncertainty_N = entropy_N / np.log(tiny.VOCAB)
    domain_N = torch.cat([LAYOUTS.batch(rows)["domain_N"] for rows, _ in cut_of(cut, teacher)])
    sums = {
        name: np.bincount(domain_N, weights=value_N.numpy())
        for name, value_N in zip(
            ("teacher_confidence", "student_uncertainty", "mean_weight"),
            (confidence_N, uncertainty_N, confidence_N * uncertainty_N),
            strict=True,
        )
    }
    weighting.follow(StepMeans(sums, np.bincount(domain_N), step=2))
    counts = np.bincount(domain_N)
    thresholds = []
    for name, scale in (("teacher_confidence", 0.9), ("student_uncertainty", 0.999)):
        means = torch.tensor(sums[name] / counts)
        thresholds.append(scale * sums[name].sum() / counts.sum() * means / means.max())
    learnt_N = confidence_N >= thresholds[0][domain_N]
    learnt_N &= uncertainty_N >= thresholds[1][domain_N]
    assert 0.1 < learnt_N.double().mean() < 0.9
    mean = (confidence_N * uncertainty_N).mean()
    weight_N = torch.where(learnt_N, confidence_N * uncertainty_N / mean, 0)
    kl_N = (dense.log_p_NV.exp() * (dense.log_p_NV - dense.log_q_NV)).sum(-1)
    found = learnt(tmp_path, tiny_pair, cut_of(cut, teacher), weighting)
    check(found, (weight_N * (kl_N - 0.5 * q_N)).mean(), dense)


class ByMass:
    """A policy of one's own: losses that ask the teacher count what it kept of its mass, those of
    the text its entropy."""

    reported: tuple[str, ...] = ()
    looks: frozenset[Look] = frozenset({"label_logprob", "entropy", "hellinger"})
    way_out = ""

    def weights(self, seen: Seen) -> PositionWeights:
        mass_N = seen.captured_mass()
        assert mass_N is not None
        assert seen.student.keys() == self.looks
        surer_N = seen.label_logprob_N - seen.student["label_logprob"]
        return PositionWeights(surer_N - mass_N, seen.student["hellinger"], {})

    def follow(self, step: StepMeans) -> None: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


@every_cut
def test_a_loss_of_the_text_may_count_otherwise_than_those_of_the_teacher(
    tmp_path: Path, tiny_pair: tiny.Pair, teacher: HFEngine, cut: str
) -> None:
    dense = Dense.of(tiny_pair)
    p_N, q_N = (x.gather(1, dense.label_N1)[:, 0] for x in (dense.log_p_NV, dense.log_q_NV))
    roots = [(log_NV / 2).exp() for log_NV in (dense.log_p_NV, dense.log_q_NV.detach())]
    distance_N = ((roots[0] - roots[1]).square().sum(-1) / 2).sqrt()
    kl_N = (dense.log_p_NV.exp() * (dense.log_p_NV - dense.log_q_NV)).sum(-1)
    found = learnt(tmp_path, tiny_pair, cut_of(cut, teacher), ByMass())
    loss_N = ((p_N - q_N).detach() - 1) * kl_N - 0.5 * distance_N * q_N
    check(found, loss_N.mean(), dense)


GATES = {"uncertainty": 0.99, "confidence": 0.5, "decay": 0.5}
WEIGHED = {"llkd": GATES, "instance_weights": {"final_steepness": 1.0}}
RUNS: dict[str, dict] = {
    **{name: {"weighting": {"policy": name, **options}} for name, options in WEIGHED.items()},
    "written": {
        "weighting": {"policy": "llkd", "unit": "document"},
        "source": {"student": 0.5, "dataset": 0.5, "max_new_tokens": 8},
        "student": {"train": {"kind": "lora", "r": 4, "alpha": 8}},
    },
    "none": {},
    "uniform": {"weighting": {"policy": "uniform"}},
    "nothing-left": {"weighting": {"policy": "llkd", **GATES, "confidence": 1e9}},
}
RESUMED = (*WEIGHED, "written")  # the last beside text of the student's own, and adapters
IN_ONE = {"batch": {"rows_per_step": 8, "micro_batch": 8}, "student": {"workers": 1}}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_pair: tiny.Pair,
) -> tuple[Path, list]:
    """Runs of two ranks in micro-batches of 2, those that weigh resumed at their middle too, and of
    one rank in one piece."""
    folder = tmp_path_factory.mktemp("weighting")
    domains, jobs = prepared_domains(folder), []
    resumed = asked(request, "killed")
    for name in (name for name in RUNS if name not in RESUMED or name in (*WEIGHED, *resumed)):
        plan = plan_of(folder / name, tiny_pair, domains, **RUNS[name])
        mark_exported(plan)
        jobs.append(as_job("resumed", plan, at=2) if name in resumed else as_job("train", plan))
    results = run_jobs(jobs, folder / "jobs")
    alone = []
    for name in WEIGHED:
        plan = plan_of(folder / f"{name}-alone", tiny_pair, domains, **RUNS[name], **IN_ONE)
        mark_exported(plan)
        alone.append(as_job("train", plan))
    run_jobs(alone, folder / "alone", ranks=1)
    return folder, results


def state_of(run: Path, step: int = 4) -> dict:
    """What the checkpoint of a step holds."""
    path = run / "checkpoints" / f"step-{step:06d}" / "state.json"
    return json.loads(path.read_text())


def test_uniform_weighting_gives_the_bits_of_none(runs) -> None:
    folder, _ = runs
    assert same_weights(folder / "uniform", folder / "none")
    assert comparable_lines(folder / "uniform") == comparable_lines(folder / "none")
    assert "weighting" not in state_of(folder / "uniform")


@pytest.mark.parametrize("killed", telling(RESUMED, "llkd", "written"))
def test_a_weighted_run_resumes_bit_for_bit_with_its_state(runs, killed: str) -> None:
    folder, _ = runs
    straight, resumed = folder / killed, folder / f"{killed}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)
    assert state_of(straight)["weighting"] == state_of(resumed)["weighting"]
    assert state_of(straight)["weighting"] != state_of(straight, 2)["weighting"]


@pytest.mark.parametrize("name", WEIGHED)
def test_a_weighted_run_learns_something_else(runs, name: str) -> None:
    folder, _ = runs
    assert not same_weights(folder / name, folder / "none")


@pytest.mark.parametrize("name", WEIGHED)
def test_the_state_is_that_of_the_step_however_it_is_cut_among_ranks(runs, name: str) -> None:
    folder, _ = runs
    found, alone = (state_of(folder / run)["weighting"] for run in (name, f"{name}-alone"))
    assert found.keys() == alone.keys()
    for key, value in found.items():
        np.testing.assert_allclose(alone[key], value, rtol=1e-5, err_msg=key)


def test_what_is_left_out_is_counted_by_domain_and_said(runs) -> None:
    folder, _ = runs
    for line in read_metrics(folder / "llkd" / "metrics.jsonl"):
        for domain in line.domains.values():
            assert domain.selected_share is not None
            assert 0 < domain.selected_share < 1
            assert domain.mean_weight is not None
            assert domain.teacher_confidence is not None
            assert domain.student_uncertainty is not None
            assert 0 < domain.teacher_confidence < domain.student_uncertainty < 1
        assert f"{line.selected_share:.0%} of tokens learnt" in said(folder / "llkd")
    (first, _) = read_metrics(folder / "none" / "metrics.jsonl")
    assert first.selected_share is None
    assert "of tokens learnt" not in said(folder / "none")


def test_a_step_without_a_token_left_ends_the_run_with_a_sentence(runs) -> None:
    folder, results = runs
    (error,) = (result for result in results if result.get("error"))
    assert error["error"] == "WeightingError"
    assert "weighting leaves none of the" in error["message"]
    assert "tokens of step 2 to learn from; lower weighting.confidence" in error["message"]
    assert not (folder / "nothing-left" / "metrics.jsonl").exists()


def said(run: Path) -> str:
    """What a run has told people."""
    return RunDir(run).progress.read_text()

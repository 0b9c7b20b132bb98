"""A policy that selects changed documents: REINFORCE on a toy, and through real runs.

N positions with loss   C changed documents   F features
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config.weighting import ReinforcedSelection
from shared.data.augmented.fills import write
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.run.metrics import read_metrics
from student_trainer.weighing.reinforced import FEATURES, Selection, features
from student_trainer.weighing.weighting import PositionWeights, Seen, StepMeans
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains
from tests.student_trainer.weighing.test_weighting import state_of
from tests.telling import asked, telling

DOCUMENTS = 3  # of the toy; two positions each, and one document that was not changed
RANDOM = np.random.default_rng(0)
TEACHER, STUDENT = -RANDOM.random((2, 2 * DOCUMENTS + 2)) * 3


def seen(numbers: list[int]) -> Seen:
    """Two positions of each document, the last of which was not changed."""
    document_N = np.repeat(np.arange(DOCUMENTS + 1), 2)
    return Seen(
        label_logprob_N=torch.tensor(TEACHER),
        captured_mass=lambda: None,
        entropy_N=None,
        student={"label_logprob": torch.tensor(STUDENT)},
        domain_N=torch.zeros(len(document_N), dtype=torch.long),
        document_N=torch.tensor(document_N),
        vocabulary=10,
        changed_N=torch.tensor(np.array([*numbers, 0])[document_N]),
    )


def numbered(draws: list[float]) -> list[int]:
    """Numbers of documents under which a policy draws these."""
    return [int(draw * 2**63) | 1 for draw in draws]


def selection(weights_F: list[float] | None = None, **options) -> Selection:
    found = Selection(ReinforcedSelection(**options), num_domains=1)
    if weights_F is not None:
        found.weights_F = np.array(weights_F)
    return found


SOME = [0.3, -0.8, 0.5, 1.2]


def keep_probabilities(weights_F: np.ndarray) -> np.ndarray:
    """p of each document of the toy, from its features alone."""
    by_document = [
        torch.tensor(values).reshape(-1, 2).mean(1)[:DOCUMENTS] for values in (TEACHER, STUDENT)
    ]
    return 1 / (1 + np.exp(-(features(*by_document).numpy() @ weights_F)))


def outcomes(policy: Selection) -> list[tuple[float, np.ndarray, PositionWeights]]:
    """The probability of every way to keep and leave out, with what is kept of it and drawn."""
    keep_C, found = keep_probabilities(policy.weights_F), []
    for kept in itertools.product((True, False), repeat=DOCUMENTS):
        kept_C = np.array(kept)
        draws = np.where(kept_C, keep_C / 2, (1 + keep_C) / 2)
        weights = policy.weights(seen(numbered(draws.tolist())))
        assert weights.taught_N.tolist() == [*np.repeat(kept_C, 2).astype(float), 1, 1]
        found.append((float(np.prod(np.where(kept_C, keep_C, 1 - keep_C))), kept_C, weights))
    return found


def policy_F(weights: PositionWeights) -> np.ndarray:
    assert weights.policy_F is not None
    return weights.policy_F.numpy()


def test_the_expected_update_is_the_gradient_of_the_expected_reward():
    def reward(kept_C: np.ndarray) -> float:
        return float(kept_C @ [0.4, -0.9, 0.2] + 0.5 * kept_C[0] * kept_C[2])

    policy = selection(SOME)
    expected_F = sum(chance * reward(kept) * policy_F(w) for chance, kept, w in outcomes(policy))
    finite_F, step = np.zeros(len(FEATURES)), 1e-5
    for place in range(len(FEATURES)):
        for sign in (1, -1):
            moved = selection(
                (np.array(SOME) + sign * step * np.eye(len(FEATURES))[place]).tolist()
            )
            mean = sum(chance * reward(kept) for chance, kept, _ in outcomes(moved))
            finite_F[place] += sign * mean / (2 * step)
    np.testing.assert_allclose(expected_F, finite_F, rtol=1e-6)
    assert np.abs(finite_F).min() > 1e-3


def test_a_constant_reward_moves_nothing_in_the_mean():
    expected_F = sum(chance * policy_F(weights) for chance, _, weights in outcomes(selection(SOME)))
    np.testing.assert_allclose(expected_F, 0, atol=1e-12)


def test_a_look_moves_the_policy_by_what_the_reward_is_over_its_running_mean():
    policy, gradient_F = selection(step_size=2.0, decay=0.75, start=0.2), np.arange(1.0, 5.0)
    assert policy.weights_F.tolist() == [pytest.approx(np.log(0.2 / 0.8)), 0, 0, 0]

    def step(loss: float, *, times: int = 1) -> np.ndarray:
        before = policy.weights_F
        for _ in range(times):
            policy.follow(StepMeans({}, np.ones(1), 1, gradient_F))
        policy.look(loss)
        return policy.weights_F - before

    assert step(5.0).tolist() == [0, 0, 0, 0]  # nothing to compare with
    assert step(4.6).tolist() == [0, 0, 0, 0]  # the first reward, .4, is its own baseline
    np.testing.assert_allclose(step(4.4, times=3), 2.0 * (0.2 - 0.4) * 3 * gradient_F)
    baseline = 0.75 * 0.4 + 0.25 * 0.2
    np.testing.assert_allclose(step(4.0), 2.0 * (0.4 - baseline) * gradient_F)


def test_a_policy_of_probability_1_keeps_all_and_stays():
    policy = selection(start=1.0)
    weights = policy.weights(seen(numbered([0.01, 0.5, 0.999])))
    assert weights.taught_N.tolist() == [1.0] * 8
    assert policy_F(weights).tolist() == [0.0] * len(FEATURES)
    again = selection(start=0.5)
    again.restore(json.loads(json.dumps(policy.state())))
    assert np.isinf(again.weights_F[0])


def test_looks_are_due_every_so_many_steps():
    policy = selection(every=3, rows=5)
    assert [step for step in range(8) if policy.is_due(step)] == [0, 3, 6]
    assert policy.rows == 5


HALF = {"share": 0.5, "replace": 0.2, "swap": 0.2, "delete": 0.2}
FILLED = HALF | {"mask": 0.2, "copies": 2}
LOSSES = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}]
REINFORCED = {"policy": "reinforced", "every": 1, "rows": 2, "step_size": 50.0}
RUNS: dict[str, dict] = {
    "plain": {},
    "changed": {"augmentation": HALF},
    "selected": {"augmentation": HALF, "weighting": REINFORCED},
    "filled": {"augmentation": FILLED, "weighting": REINFORCED},
    "all-kept": {"augmentation": HALF, "weighting": REINFORCED | {"start": 1.0}},
    "none-kept": {"augmentation": HALF | {"share": 1.0}, "weighting": REINFORCED | {"start": 1e-9}},
}
RESUMED = ("changed", "selected", "filled")
IN_ONE = {"batch": {"rows_per_step": 8, "micro_batch": 8}, "student": {"workers": 1}}


def filled(domains: Sequence[PreparedDomain]) -> tuple[PreparedDomain, ...]:
    """The domains with made-up fills of two copies: id 7 or 8 in place of every third token."""
    found = []
    for domain in domains:
        rows = RowStore.open(domain.train_path).take(range(domain.num_rows))
        lines = [(ids, copy) for ids in rows.column("input_ids") for copy in range(2)]
        places = [np.arange(2, len(ids) - 1, 3) for ids, _ in lines]
        fills = [np.full(len(at), 7 + n) for at, (_, n) in zip(places, lines, strict=True)]
        path = Path(domain.train_path).with_suffix(".fills")
        write(path, copies=2, places=places, ids=fills)
        found.append(replace(domain, fills_path=str(path)))
    return tuple(found)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_pair: tiny.Pair,
) -> tuple[Path, list]:
    """Runs of two ranks in micro-batches of 2, some resumed at their middle too, and one of one
    rank in one piece."""
    folder = tmp_path_factory.mktemp("augmented")
    domains, jobs = filled(prepared_domains(folder)), []
    for name, options in RUNS.items():
        plan = plan_of(folder / name, tiny_pair, domains, losses=LOSSES, **options)
        mark_exported(plan)
        resumes = name in asked(request, "name")
        jobs.append(as_job("resumed", plan, at=2) if resumes else as_job("train", plan))
    results = run_jobs(jobs, folder / "jobs")
    options = RUNS["selected"] | IN_ONE
    plan = plan_of(folder / "alone", tiny_pair, domains, losses=LOSSES, **options)
    mark_exported(plan)
    run_jobs([as_job("train", plan)], folder / "alone-jobs", ranks=1)
    return folder, results


@pytest.mark.parametrize("name", telling(RESUMED, "selected"))
def test_a_run_on_changed_documents_resumes_bit_for_bit(runs, name: str) -> None:
    folder, _ = runs
    straight, resumed = folder / name, folder / f"{name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)
    assert state_of(straight) == state_of(resumed)
    others = {"changed": "plain", "selected": "changed", "filled": "selected"}
    assert not same_weights(straight, folder / others[name])


def test_a_policy_that_keeps_all_has_the_bits_of_none(runs) -> None:
    folder, _ = runs
    assert same_weights(folder / "all-kept", folder / "changed")
    assert not same_weights(folder / "selected", folder / "changed")


def test_the_policy_learns_the_same_however_a_step_is_cut_among_ranks(runs) -> None:
    folder, _ = runs
    found, alone = (state_of(folder / name)["weighting"] for name in ("selected", "alone"))
    for key, value in found.items():
        # Rewards are differences of losses in float32, and the rate is high.
        np.testing.assert_allclose(alone[key], value, rtol=1e-4, atol=1e-7, err_msg=key)
    assert found["weights"] != state_of(folder / "selected", 2)["weighting"]["weights"]


def test_what_is_changed_and_kept_is_counted_by_domain(runs) -> None:
    folder, _ = runs
    lines, totals = read_metrics(folder / "selected" / "metrics.jsonl"), np.zeros(2)
    for domain in (domain for line in lines for domain in line.domains.values()):
        assert domain.changed_share is not None
        assert domain.kept_share is not None
        left = domain.changed_share - domain.kept_share
        assert domain.selected_share == pytest.approx(1 - left, abs=1e-9)
        totals += domain.tokens * np.array([domain.changed_share, domain.kept_share])
    changed, kept = totals / sum(
        domain.tokens for line in lines for domain in line.domains.values()
    )
    assert 0.1 < kept < changed < 0.9


def test_a_step_of_which_nothing_is_kept_ends_the_run_with_a_sentence(runs) -> None:
    _, results = runs
    (error,) = (result for result in results if result.get("error"))
    assert error["error"] == "WeightingError"
    assert "of step 1 to learn from; lower augmentation.share, or raise" in error["message"]

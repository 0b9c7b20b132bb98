"""CoMMIT: what sees and what says are kept in step, by laws of the coefficient and in real runs.

N positions   V vocabulary
"""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config.tasks.balance import Balance
from shared.data.row_store import RowStore
from shared.run.metrics import read_metrics
from student_trainer.balance import ModalityBalance, factors_of, ratio
from student_trainer.sources.batches import Layouts, Step
from student_trainer.tasks.registry import task_of
from tests import pictured
from tests.pictured import config_of, plan_of
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.tasks.test_image_text import half_bare, rewritten
from tests.telling import asked, telling
from tests.tiny import Pair

EVERY = {"every": 2, "decay": 0.5, "least": 0.6, "most": 1.5, "positions": 8}


class Alone:
    """One rank."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values


class Sum(torch.nn.Module):
    """Logits [N, V] that two weights move alike."""

    def __init__(self) -> None:
        super().__init__()
        self.sees = torch.nn.Parameter(torch.linspace(0, 1, 7))
        self.says = torch.nn.Parameter(torch.linspace(1, 0, 7))

    def forward(self, batch, *, mode):
        assert mode == "logits"
        return ((self.sees + self.says) * batch["loss_index_N"][:, None].double(),)


def balance_of(model: Sum, **asked: float) -> ModalityBalance:
    return ModalityBalance(Balance(**asked), model, Alone(), ([model.sees], [model.says]))  # type: ignore[arg-type]


BATCH = {"loss_index_N": torch.arange(1, 30)}
STEP = torch.linspace(-1, 1, 7) ** 3 / 50


def test_equal_steps_have_a_kappa_of_one_and_leave_rates_alone():
    model = Sum()
    balance = balance_of(model)
    with balance.watching(BATCH), torch.no_grad():
        model.sees += STEP
        model.says += STEP
    assert balance.line().kappa == pytest.approx(1, rel=1e-6)
    assert balance.factors == pytest.approx({"vision": 1, "language": 1}, rel=1e-6)
    after = torch.linspace(0, 1, 7) + STEP
    assert torch.equal(model.sees, after), "what was tried is put back, bit for bit"


@pytest.mark.parametrize(("side", "kappa"), [("sees", 0.0), ("says", None)])
def test_a_frozen_side_is_told_and_the_other_one_slowed_to_the_bound(side, kappa):
    model = Sum()
    balance = balance_of(model, least=0.7, most=1.25)
    with balance.watching(BATCH), torch.no_grad():
        getattr(model, {"sees": "says", "says": "sees"}[side]).add_(STEP)
    assert balance.line().kappa == kappa
    fast, slow = ("language", "vision") if kappa == 0 else ("vision", "language")
    assert balance.factors == {fast: 0.7, slow: 1.25}


def test_kappa_is_that_of_the_divergences_in_float64_and_its_factors_undo_it():
    """A step of twice the size moves four times as far, and factors of x^(1/4) even that out."""
    model = Sum()
    balance = balance_of(model, positions=10)
    with balance.watching(BATCH), torch.no_grad():
        model.sees += 2 * STEP
        model.says += STEP
    index_N = BATCH["loss_index_N"][::3].double()
    old_NV = (torch.ones(7).double() * index_N[:, None]).log_softmax(-1)
    kls = []
    for step in (2 * STEP, STEP):
        new_NV = ((torch.ones(7) + step).double() * index_N[:, None]).log_softmax(-1)
        kls.append(float((new_NV.exp() * (new_NV - old_NV)).sum()))
    assert balance.line().kappa == pytest.approx(kls[0] / kls[1], rel=1e-3)
    vision, language = balance.factors["vision"], balance.factors["language"]
    assert 2 * vision / language == pytest.approx(1, rel=0.05)


def test_a_step_too_small_for_float32_is_measured():
    """Of a millionth, whose KL is below the rounding of single precision."""
    model = Sum().double()
    balance = balance_of(model, positions=10)
    with balance.watching(BATCH), torch.no_grad():
        model.sees += 2e-6 * STEP
        model.says += 1e-6 * STEP
    assert balance.line().kappa == pytest.approx(4, rel=1e-2)


def test_measurements_are_at_equal_rates_and_fade():
    model = Sum()
    balance = balance_of(model, decay=0.5)
    balance._follow(np.array([4.0, 1.0]), np.array([1.0, 1.0]))
    assert ratio(balance._moved_2) == 4
    balance._follow(np.array([1.0, 1.0]), np.array([0.5, 1.0]))  # 4 to 1 again at equal rates
    assert ratio(balance._moved_2) == 4
    balance._follow(np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    assert balance._moved_2.tolist() == [2.5, 1.0]


class Beside(Alone):
    """A rank beside another one with images."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values + 1


def test_rows_with_images_alone_are_looked_at(tmp_path, pair):
    """And nothing where no rank has any, so that the language part is not slowed for that."""
    config = rewritten(config_of(tmp_path, "run", pair=pair), half_bare)
    (domain,) = plan_of(config).domains
    rows = RowStore.open(domain.train_path).take(range(12))
    seen = [bool(own) for own in rows.images()]
    assert 0 < sum(seen) < len(seen)
    bare, mixed = rows.where([not has for has in seen]), rows
    layouts = Layouts(("shapes",), False, torch.device("cpu"), task=task_of(config))
    balance = balance_of(Sum(), every=2)
    step = partial(Step, domain_tokens_D=np.ones(1), domain_rows_D=np.ones(1))
    found = balance.chosen(step(0, (bare, mixed)), layouts)
    assert found is not None
    expected = layouts.batch(rows.where(seen))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert balance.chosen(step(0, (bare,)), layouts) is None
    assert balance.chosen(step(1, (mixed,)), layouts) is None
    other = dataclasses.replace(balance, ranks=Beside())  # type: ignore[arg-type]
    none = other.chosen(step(0, (bare,)), layouts)
    assert none is not None
    assert len(none["loss_index_N"]) == 0


@pytest.mark.parametrize("kappa", [0.0, 1e-9, 0.3, 1.0, 7.0, 1e9, np.inf])
def test_factors_lie_within_their_bounds(kappa):
    asked = Balance(least=0.5, most=2.0)
    vision, language = factors_of(kappa, asked)
    assert 0.5 <= min(vision, language) <= 1 <= max(vision, language) <= 2.0
    assert factors_of(1 / kappa if kappa else np.inf, asked) == pytest.approx((language, vision))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pictured.save_pair(tmp_path_factory.mktemp("models"))


LORA = {"kind": "lora", "r": 2}
STEADY = {"least": 1.0, "most": 1.0}  # measures, and changes no rate
RUNS = {
    "balanced": {"optimiser": {"balance": EVERY}, "log_every": 3},
    "adapted": {
        "student": {"zero": 0, "train": LORA},
        "optimiser": {"balance": EVERY},
        "log_every": 3,
    },
    "seldom": {"optimiser": {"balance": {"every": 4, **STEADY}}},
    "steady": {"optimiser": {"balance": {"every": 2, **STEADY}}},
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pair: Pair
) -> Path:
    """A folder with runs, the first two again from the checkpoint at their middle."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    resumed = asked(request, "name", always=("balanced",))
    for name in (*resumed, "seldom", "steady"):
        plan = plan_of(config_of(folder, name, pair=pair, **RUNS[name]))
        jobs.append(as_job("resumed", plan, at=2) if name in resumed else as_job("train", plan))
    run_jobs(jobs, folder / "jobs", ranks=2)
    return folder


@pytest.mark.parametrize("name", telling(["balanced", "adapted"], "balanced"))
def test_a_killed_run_ends_with_the_same_bits(runs, name):
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)


def test_measuring_changes_no_bit_and_factors_do(runs):
    assert same_weights(runs / "seldom", runs / "steady")
    assert not same_weights(runs / "seldom", runs / "balanced")


def test_the_balance_and_what_it_costs_are_in_the_lines(runs):
    lines = read_metrics(runs / "steady" / "metrics.jsonl")
    assert all(((line.balance and line.balance.kappa) or 0) > 0 for line in lines)
    assert lines[0].balance == lines[1].balance, "every second step is measured"
    assert lines[1].balance != lines[2].balance
    assert lines[0].balancing_s > 0 == lines[1].balancing_s
    assert "kappa" in (runs / "steady" / "logs" / "progress.log").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "language_model"}, "has no part that sees"),
        ({"student": {"zero": 3}}, "holds a weight whole"),
        ({"student": {"workers": {"min": 1, "max": 2}}}, "regroups weights"),
        ({"optimiser": {"balance": {"least": 1.2}}}, "must lie between them"),
    ],
)
def test_what_has_no_two_sides_is_refused(tmp_path, pair, options, said):
    given = {"optimiser": {"balance": EVERY}} | options
    with pytest.raises(ValueError, match=said):
        config_of(tmp_path, "run", pair=pair, **given)

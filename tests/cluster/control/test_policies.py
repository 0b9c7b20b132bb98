"""All policies behind one interface: openings, memory in the log, floors and caps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from cluster.control.controller import Controller, ControllerPlan
from cluster.control.policies import POLICIES
from shared.config.mixture import (
    DDKMixture,
    DoReMiMixture,
    FixedMixture,
    Mixture,
    ODMMixture,
    ShearedMixture,
)
from shared.mixture.weight_log import DomainReport, read_log
from tests.cluster.control.own import LargestGapMixture, LargestGapPolicy
from tests.cluster.run_dirs import controlled

NATURAL = (0.4, 0.3, 0.2, 0.1)
NAMES = ("math", "code", "law", "news")
ADAPTIVE = tuple(name for name in POLICIES if name != "fixed")
OFTEN: dict[str, Any] = {"interval": 10, "lag_steps": 2}
Reports = Sequence[DomainReport]


def _mixture(policy: str, **options: Any) -> Any:
    common = OFTEN if policy in ADAPTIVE else {}
    mixture = {"policy": policy, **common, **options}
    return TypeAdapter(Mixture).validate_python(mixture)


def _plan(folder: Path, mixture: Mixture) -> ControllerPlan:
    folder.mkdir(exist_ok=True)
    config = controlled(mixture, domains=NAMES)
    return ControllerPlan(config, NATURAL, str(folder / "weight_log.jsonl"))


def _report(step: int) -> DomainReport:
    """Lively sums that depend on the step; now and then a domain is not seen."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, 1000, 4) * (rng.random(4) < 0.8)
    kl, excess = rng.exponential(2, (2, 4)) * tokens
    return DomainReport(
        step,
        tuple((rng.uniform(2, 5, 4) * 100).tolist()),
        (100,) * 4,
        (2.0, 2.5, 3.0, 2.2),
        tuple(tokens.tolist()),
        tuple(kl.tolist()),
        tuple(excess.tolist()),
    )


def _weights(controller: Controller) -> np.ndarray:
    return np.array([entry.weights for entry in controller.log.entries])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("doremi", (0.25,) * 4), ("sheared", NATURAL), ("odm", (0.25,) * 4)],
)
def test_entry_0_is_known_without_a_report(
    tmp_path: Path, policy: str, expected: tuple[float, ...]
) -> None:
    controller = Controller(_plan(tmp_path, _mixture(policy)))
    assert controller.entry(0).weights == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("policy", "options"), [*((policy, {}) for policy in ADAPTIVE), ("ddk", {"start": "ddk"})]
)
def test_a_restart_after_any_decision_changes_nothing(
    tmp_path: Path, policy: str, options: dict[str, Any]
) -> None:
    mixture = _mixture(policy, max_change=0.1, **options)
    whole = Controller(_plan(tmp_path / "a", mixture))
    for step in range(0, 80, 10):
        whole.observe(_report(step))
        Controller(_plan(tmp_path / "b", mixture)).observe(_report(step))
    logs = [(tmp_path / run / "weight_log.jsonl").read_bytes() for run in "ab"]
    assert logs[0] == logs[1]
    assert read_log(tmp_path / "a" / "weight_log.jsonl", NAMES) == whole.log
    assert len(whole.log.entries) == 8


STEPS = range(0, 200, 10)


def _seen(report: DomainReport, sums: tuple[float, ...], before_D: np.ndarray) -> np.ndarray:
    """Means per training token; what was there before where a domain was not seen."""
    tokens_D = np.array(report.training_tokens)
    return np.where(tokens_D > 0, np.array(sums) / np.maximum(tokens_D, 1), before_D)


def _raised(weight_D: np.ndarray, loss_D: np.ndarray) -> np.ndarray:
    """w exp(0.7 loss), normalised, with 0.05 of the uniform distribution."""
    raised_D = weight_D * np.exp(0.7 * loss_D)
    return 0.95 * raised_D / raised_D.sum() + 0.05 / 4


def _fixed(reports: Reports) -> Iterator[np.ndarray]:
    for _ in reports:
        yield np.array([0.1, 0.6, 0.3, 0.0])


def _ddk(reports: Reports) -> Iterator[np.ndarray]:
    """Eq. 1, then Eq. 2 with an alpha of 0.8."""
    factor_D = None
    for report in reports:
        student_D = np.exp(np.array(report.student_nll_sums) / report.num_tokens)
        raised_D = np.exp(student_D / np.exp(report.teacher_nlls))
        raised_D = raised_D if factor_D is None else factor_D * raised_D
        share_D = raised_D / raised_D.sum()
        factor_D = share_D if factor_D is None else 0.8 * share_D + 0.2 / 4
        yield factor_D


def _doremi(reports: Reports) -> Iterator[np.ndarray]:
    weight_D, excess_D = np.full(4, 0.25), np.zeros(4)
    yield weight_D
    for report in reports[1:]:
        excess_D = _seen(report, report.training_excess_sums, excess_D)
        weight_D = _raised(weight_D, excess_D)
        yield weight_D


def _sheared(reports: Reports) -> Iterator[np.ndarray]:
    weight_D = np.array(NATURAL)
    yield weight_D
    for report in reports[1:]:
        student_D = np.array(report.student_nll_sums) / report.num_tokens
        weight_D = _raised(weight_D, np.maximum(student_D - report.teacher_nlls, 0))
        yield weight_D


def _odm(reports: Reports) -> Iterator[np.ndarray]:
    """With four domains exploration leaves room from the sixth decision on. The first two of an
    interval's ten blocks are drawn under the entry before the last."""
    weight_D, reward_D, before = np.full(4, 0.25), np.zeros(4), 0.25
    older_D = weight_D
    yield weight_D
    for t, report in enumerate(reports[1:], start=1):
        seen_D = np.array(report.training_tokens) > 0
        kl_D = _seen(report, report.training_kl_sums, reward_D)
        drawn_D, older_D = 0.2 * older_D + 0.8 * weight_D, weight_D
        reward_D = np.where(seen_D, 0.6 * reward_D + 0.4 * kl_D / drawn_D, reward_D)
        explored = min(0.25, np.sqrt(np.log(4) / (4 * t)))
        exploited_D = np.exp(before * reward_D) / np.exp(before * reward_D).sum()
        weight_D, before = (1 - 4 * explored) * exploited_D + explored, explored
        yield weight_D


# Each policy, its options no defaults, and the weights of every entry by its equations.
WEIGHTS = dict(zip(NAMES, (1.0, 6.0, 3.0, 0.0), strict=True))
LAWS: dict[str, tuple[Mixture, Callable[[Reports], Iterator[np.ndarray]]]] = {
    "fixed": (FixedMixture(weights=WEIGHTS), _fixed),
    "ddk": (DDKMixture(**OFTEN, alpha=0.8, start="ddk"), _ddk),
    "doremi": (DoReMiMixture(**OFTEN, step_size=0.7, smoothing=0.05), _doremi),
    "sheared": (ShearedMixture(**OFTEN, step_size=0.7, smoothing=0.05), _sheared),
    "odm": (ODMMixture(**OFTEN, smoothing=0.6), _odm),
}


def test_every_policy_of_a_config_is_known_and_tested() -> None:
    kinds = get_args(get_args(Mixture)[0])
    assert {kind.model_fields["policy"].default for kind in kinds} == set(POLICIES) == set(LAWS)


def test_the_reports_leave_domains_out_now_and_then() -> None:
    assert any(0 in _report(step).training_tokens for step in STEPS)


@pytest.mark.parametrize("policy", LAWS)
def test_a_policy_follows_its_equations(tmp_path: Path, policy: str) -> None:
    mixture, equations = LAWS[policy]
    reports = [_report(step) for step in STEPS]
    controller = Controller(_plan(tmp_path, mixture))
    for report in reports:
        controller.observe(report)
    found_ED = _weights(controller)
    np.testing.assert_allclose(found_ED, [*equations(reports)][: len(found_ED)], atol=1e-12)
    assert len(found_ED) == (1 if policy == "fixed" else len(reports))
    assert np.ptp(found_ED[-1]) > 0.05


@pytest.mark.parametrize("policy", ADAPTIVE)
@pytest.mark.parametrize(("floor", "max_change"), [(0, 1), (0.1, 1), (0, 0.02), (0.05, 0.03)])
def test_floors_and_caps_hold_after_every_decision(
    tmp_path: Path, policy: str, floor: float, max_change: float
) -> None:
    mixture = _mixture(policy, floor=floor, max_change=max_change)
    controller = Controller(_plan(tmp_path, mixture))
    for step in range(0, 300, 10):
        controller.observe(_report(step))
    weights_TD = _weights(controller)
    np.testing.assert_allclose(weights_TD.sum(axis=1), 1, atol=1e-12)
    assert weights_TD.min() >= floor
    assert np.abs(np.diff(weights_TD, axis=0)).max() <= max_change + 1e-15
    assert np.ptp(weights_TD, axis=0).max() > 0.01


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_the_domain_that_lags_most_comes_to_rule(tmp_path: Path, policy: str) -> None:
    controller = Controller(_plan(tmp_path, _mixture(policy)))
    for step in range(0, 200, 10):
        lag = (1.0, 1.0, 3.0, 1.0)
        validation = tuple(100 * (2 + gap / 5) for gap in lag)
        training = tuple(100 * gap for gap in lag)
        controller.observe(
            DomainReport(step, validation, (100,) * 4, (2.0,) * 4, (100,) * 4, training, training)
        )
    assert np.argmax(_weights(controller)[-1]) == 2


def test_a_further_policy_is_one_class_one_section_and_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "largest_gap", LargestGapPolicy)
    mixture: Any = LargestGapMixture(interval=10, lag_steps=2, share=0.6, max_change=0.5)
    plan = _plan(tmp_path, _mixture("ddk"))
    plan = replace(plan, config=plan.config.model_copy(update={"mixture": mixture}))
    controller = Controller(plan)
    gaps = [(1.0, 3.0, 1.0, 1.0), (1.0, 1.0, 1.0, 3.0)]
    for step, gap in zip((0, 10, 20), [gaps[0], *gaps], strict=True):
        nll = tuple(100 * (2.0 + g) for g in gap)
        controller.observe(DomainReport(step, nll, (100,) * 4, (2.0,) * 4, (1,) * 4, nll, nll))
    expected = [NATURAL, (0.16, 0.72, 0.08, 0.04), (0.16, 0.22, 0.08, 0.54)]
    assert _weights(controller) == pytest.approx(np.array(expected), abs=1e-12)

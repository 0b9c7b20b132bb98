"""All policies behind one interface: openings, memory in the log, floors and caps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from cluster.control.controller import Controller, ControllerPlan
from shared.config.mixture import Mixture
from shared.mixture.weight_log import DomainReport, read_log
from tests.cluster.run_dirs import controlled

NATURAL = (0.4, 0.3, 0.2, 0.1)
NAMES = ("math", "code", "law", "news")
ADAPTIVE = ("ddk", "doremi", "sheared", "odm")


def _mixture(policy: str, **options: Any) -> Any:
    fields = {"policy": policy, "interval": 10, "lag_steps": 2, **options}
    return TypeAdapter(Mixture).validate_python(fields)


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


STEPS = range(10, 60, 10)


def _decided(folder: Path, policy: str, **options: Any) -> np.ndarray:
    """Weights of entry 0 and of those decided at STEPS."""
    controller = Controller(_plan(folder, _mixture(policy, **options)))
    for step in STEPS:
        controller.observe(_report(step))
    return _weights(controller)


def _seen(report: DomainReport, sums: tuple[float, ...], before_D: np.ndarray) -> np.ndarray:
    """Means per training token; what was there before where a domain was not seen."""
    tokens_D = np.array(report.training_tokens)
    return np.where(tokens_D > 0, np.array(sums) / np.maximum(tokens_D, 1), before_D)


def _raised(weight_D: np.ndarray, loss_D: np.ndarray) -> np.ndarray:
    """w exp(0.7 loss), normalised, with 0.05 of the uniform distribution."""
    raised_D = weight_D * np.exp(0.7 * loss_D)
    return 0.95 * raised_D / raised_D.sum() + 0.05 / 4


def test_the_reports_leave_domains_out_now_and_then() -> None:
    assert any(0 in _report(step).training_tokens for step in STEPS)


def test_doremi_follows_its_equations(tmp_path: Path) -> None:
    weight_D, excess_D = np.full(4, 0.25), np.zeros(4)
    found = _decided(tmp_path, "doremi", step_size=0.7, smoothing=0.05)
    for step, found_D in zip(STEPS, found[1:], strict=True):
        excess_D = _seen(_report(step), _report(step).training_excess_sums, excess_D)
        weight_D = _raised(weight_D, excess_D)
        np.testing.assert_allclose(found_D, weight_D, atol=1e-12)


def test_sheared_follows_its_equations(tmp_path: Path) -> None:
    weight_D = np.array(NATURAL)
    found = _decided(tmp_path, "sheared", step_size=0.7, smoothing=0.05)
    for step, found_D in zip(STEPS, found[1:], strict=True):
        report = _report(step)
        student_D = np.array(report.student_nll_sums) / report.num_tokens
        weight_D = _raised(weight_D, np.maximum(student_D - report.teacher_nlls, 0))
        np.testing.assert_allclose(found_D, weight_D, atol=1e-12)


def test_odm_follows_its_equations(tmp_path: Path) -> None:
    """With four domains exploration leaves room from the sixth decision on. The first two of an
    interval's ten blocks are drawn under the entry before the last."""
    weight_D, reward_D, before = np.full(4, 0.25), np.zeros(4), 0.25
    older_D = weight_D
    controller = Controller(_plan(tmp_path, _mixture("odm", smoothing=0.6)))
    for t in range(1, 20):
        report = _report(10 * t)
        controller.observe(report)
        seen_D = np.array(report.training_tokens) > 0
        kl_D = _seen(report, report.training_kl_sums, reward_D)
        drawn_D, older_D = 0.2 * older_D + 0.8 * weight_D, weight_D
        reward_D = np.where(seen_D, 0.6 * reward_D + 0.4 * kl_D / drawn_D, reward_D)
        explored = min(0.25, np.sqrt(np.log(4) / (4 * t)))
        exploited_D = np.exp(before * reward_D) / np.exp(before * reward_D).sum()
        weight_D, before = (1 - 4 * explored) * exploited_D + explored, explored
        np.testing.assert_allclose(controller.entry(t).weights, weight_D, atol=1e-12)
    assert np.ptp(weight_D) > 0.05


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

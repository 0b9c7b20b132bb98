"""All policies behind one interface: openings, memory in the log, floors and caps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from cluster.controller import Controller, ControllerPlan
from shared.config_mixture import Mixture
from shared.domains import DomainReport, read_log
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

"""Which step decides about which block, and what an entry says beside its weights."""

from typing import Any

import pytest

from shared.config.mixture import DDKMixture, FixedMixture
from shared.config.run import Config
from shared.errors import NonFiniteLossError
from shared.mixture.decisions import (
    decision_index,
    first_entry,
    has_caught_up,
    known_through,
    mean_gap,
    next_entry,
)
from shared.mixture.weight_log import DomainReport, WeightEntry

NAMES = ("math", "code")


def _config(steps: int, mixture: FixedMixture | DDKMixture, **parts: Any) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "steps": steps,
            "teachers": {"big": {"model": "teacher"}},
            "student": {"model": "student"},
            "domains": {name: {"train": f"{name}.jsonl"} for name in NAMES},
            "mixture": mixture.model_dump(),
            **parts,
        }
    )


def _report(step: int, *nlls: float) -> DomainReport:
    """A student's validation losses beside a teacher's of 2.0 and 1.0."""
    return DomainReport(step, tuple(10 * nll for nll in nlls), (10, 10), (2.0, 1.0))


def test_fixed_weights_are_decided_once() -> None:
    config = _config(100, FixedMixture())
    assert list(config.decision_steps) == [0]
    assert decision_index(config, 77) == 0
    assert known_through(config, 0) > 10**12


def test_fixed_weights_with_phases_are_decided_at_an_interval() -> None:
    config = _config(100, FixedMixture(), progressive={"interval": 10})
    assert list(config.decision_steps) == list(range(0, 98, 10))
    assert decision_index(config, 77) == 7
    assert known_through(config, 70) == 81
    derived = _config(300, FixedMixture(), progressive={"phases": 5})
    assert derived.decision_interval == 6


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("interval", [5, 7, 20])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 22, 23, 61])
def test_decisions_settle_exactly_the_blocks_before_the_next_one_takes_effect(
    steps: int, interval: int, lag: int
) -> None:
    config = _config(steps, DDKMixture(interval=interval, lag_steps=lag))
    decided = config.decision_steps
    assert list(decided) == [s for s in range(0, steps, interval) if s == 0 or s + lag < steps]
    assert [decision_index(config, s) for s in decided] == list(range(len(decided)))
    for done in range(steps):
        later = [s + lag for s in decided if s > done]
        settled = [b for b in range(steps) if all(b < effect for effect in later)]
        assert settled == list(range(min(steps, known_through(config, done) + 1)))
        assert done in settled


def test_the_gap_is_the_mean_over_domains_with_validation_text() -> None:
    assert mean_gap(_report(10, 3.0, 1.5), domains=NAMES) == pytest.approx((1.0 + 0.5) / 2)
    partly = DomainReport(10, (30.0, 0.0), (10, 0), (2.0, 0.0))
    assert mean_gap(partly, domains=NAMES) == pytest.approx(1.0)
    assert mean_gap(DomainReport(10), domains=NAMES) is None
    with pytest.raises(NonFiniteLossError, match="student's validation loss at step 10"):
        mean_gap(_report(10, float("nan"), 1.0), domains=NAMES)


def test_the_student_has_caught_up_when_no_domain_is_above_the_ratio() -> None:
    near = _report(10, 2.04, 1.04)
    assert has_caught_up(near, ratio=1.05, domains=NAMES)
    assert not has_caught_up(near, ratio=1.03, domains=NAMES)
    assert not has_caught_up(_report(10, 2.04, 1.2), ratio=1.05, domains=NAMES)
    assert not has_caught_up(near, ratio=None, domains=NAMES)


def test_an_entry_takes_effect_after_the_lag_and_says_what_was_measured() -> None:
    config = _config(100, DDKMixture(interval=10, lag_steps=3, stop_ratio=1.5))
    first = first_entry((0.5, 0.5), factors=None, report=_report(0, 2.0, 1.0), domains=NAMES)
    assert first == WeightEntry(0, 0, 0, (0.5, 0.5), gap=0.0)
    entry = next_entry(config, [first], _report(10, 2.5, 1.2), weights=(0.4, 0.6), factors=None)
    assert entry == WeightEntry(1, 10, 13, (0.4, 0.6), gap=pytest.approx(0.35))
    last = next_entry(config, [first], _report(10, 2.4, 1.4), weights=(0.4, 0.6), factors=None)
    assert last.stop

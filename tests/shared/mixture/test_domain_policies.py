"""DoReMi, Sheared and ODM: golden vectors from the papers' equations, and their laws."""

from typing import Any

import numpy as np
import pytest

from shared.config.mixture import DoReMiMixture, ShearedMixture
from shared.errors import NonFiniteLossError
from shared.mixture.domain_policies import (
    excess_losses,
    exp3_weights,
    exploration,
    loss_differences,
    raised_weights,
    smoothed_rewards,
)
from shared.mixture.weight_log import DomainReport

NAMES = ("math", "code", "law")
BEFORE_D = np.array([0.5, 0.3, 0.2])
STUDENT_D, TEACHER_D = np.array([12.0, 9.0, 6.0]), np.array([8.0, 8.0, 5.0])  # perplexities
GOLDEN_D = [0.564949, 0.254245, 0.180806]


def _trained(tokens: tuple[int, ...], *, kl=(), excess=()) -> DomainReport:
    return DomainReport(
        10, training_tokens=tokens, training_kl_sums=kl, training_excess_sums=excess
    )


def _validated(student_D: np.ndarray, teacher_D: np.ndarray) -> DomainReport:
    """Validation losses in nats per token, over 10 tokens each."""
    sums = tuple((10 * student_D).tolist())
    return DomainReport(10, sums, (10,) * len(sums), tuple(teacher_D.tolist()))


def test_doremi_golden_vector() -> None:
    sums = tuple((100 * np.log(STUDENT_D / TEACHER_D)).tolist())
    excess_D = excess_losses(_trained((100, 100, 100), excess=sums), np.zeros(3))
    found_D = raised_weights(BEFORE_D, excess_D, step_size=1, smoothing=1e-4)
    np.testing.assert_allclose(found_D, GOLDEN_D, atol=5e-7)


def test_sheared_golden_vector() -> None:
    report = _validated(np.log(STUDENT_D), np.log(TEACHER_D))
    loss_D = loss_differences(report, domains=NAMES)
    found_D = raised_weights(BEFORE_D, loss_D, step_size=1, smoothing=1e-4)
    np.testing.assert_allclose(found_D, GOLDEN_D, atol=5e-7)


def test_odm_golden_vector() -> None:
    assert exploration(100, num_domains=3) == pytest.approx(0.060515, abs=5e-7)
    assert exploration(99, num_domains=3) == pytest.approx(0.060820, abs=5e-7)
    found_D = exp3_weights(np.array([2.5, 2.2, 1.8]), decision=100)
    np.testing.assert_allclose(found_D, [0.338878, 0.333845, 0.327276], atol=5e-7)


@pytest.mark.parametrize("smoothing", [1e-4, 0.1, 1.0])
def test_without_excess_weights_move_only_toward_uniform(smoothing: float) -> None:
    found_D = raised_weights(BEFORE_D, np.zeros(3), step_size=1, smoothing=smoothing)
    np.testing.assert_allclose(found_D - 1 / 3, (1 - smoothing) * (BEFORE_D - 1 / 3), atol=1e-15)


def test_equal_differences_leave_weights_alone_up_to_the_smoothing() -> None:
    found_D = raised_weights(BEFORE_D, np.full(3, 0.7), step_size=1, smoothing=1e-4)
    np.testing.assert_allclose(found_D, (1 - 1e-4) * BEFORE_D + 1e-4 / 3, atol=1e-15)


def test_a_vanishing_step_leaves_weights_alone() -> None:
    found_D = raised_weights(BEFORE_D, np.array([5, 1, 0]), step_size=1e-12, smoothing=1e-12)
    np.testing.assert_allclose(found_D, BEFORE_D, atol=1e-11)


@pytest.mark.parametrize("mixture", [DoReMiMixture, ShearedMixture])
def test_the_largest_step_leaves_all_but_the_leader_the_smoothing(mixture: Any) -> None:
    largest = next(m.le for m in mixture.model_fields["step_size"].metadata if hasattr(m, "le"))
    found_D = raised_weights(
        BEFORE_D, np.array([1e300, 0.0, 0.0]), step_size=largest, smoothing=0.3
    )
    np.testing.assert_allclose(found_D, [0.8, 0.1, 0.1], atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_raised_weights_stay_on_the_simplex_above_their_share_of_the_uniform(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 50))
    smoothing = float(rng.uniform(1e-4, 1))
    weight_D, loss_D = rng.dirichlet(np.ones(count)), rng.exponential(300, count)
    found_D = raised_weights(weight_D, loss_D, step_size=3, smoothing=smoothing)
    assert found_D.sum() == pytest.approx(1, abs=1e-12)
    assert found_D.min() >= smoothing / count * (1 - 1e-12)


def test_a_student_below_its_teacher_counts_as_level_with_it() -> None:
    report = _validated(np.array([1.0, 3.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    np.testing.assert_allclose(loss_differences(report, domains=NAMES), [0, 1, 0], atol=1e-15)


def test_a_domain_that_was_not_seen_keeps_its_last_excess() -> None:
    report = _trained((10, 0, 5), excess=(4.0, 0.0, 0.0))
    last_D = np.array([1.0, 0.25, 0.5])
    assert excess_losses(report, last_D).tolist() == [0.4, 0.25, 0.0]
    assert last_D.tolist() == [1.0, 0.25, 0.5]


def test_rewards_are_importance_weighted_and_unseen_domains_keep_theirs() -> None:
    report = _trained((10, 0, 5), kl=(4.0, 0.0, 1.0))
    found_D = smoothed_rewards(
        np.array([1.0, 2.0, 3.0]), report, weight_D=np.array([0.5, 0.5, 0.0]), smoothing=0.9
    )
    np.testing.assert_allclose(found_D, [0.9 + 0.1 * 0.4 / 0.5, 2.0, 3.0], atol=1e-15)


@pytest.mark.parametrize("decision", [0, 1, 2, 50, 10**6])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_exp3_stays_on_the_simplex_above_its_exploration(count: int, decision: int) -> None:
    reward_D = np.random.default_rng(count).exponential(100, count)
    found_D = exp3_weights(reward_D, decision=decision)
    assert found_D.sum() == pytest.approx(1, abs=1e-12)
    assert found_D.min() >= exploration(decision, num_domains=count) * (1 - 1e-12)
    if decision == 0:
        np.testing.assert_allclose(found_D, 1 / count, atol=1e-15)


@pytest.mark.parametrize("decision", [1, 7, 1000])
def test_equal_rewards_are_uniform(decision: int) -> None:
    np.testing.assert_allclose(
        exp3_weights(np.full(5, 3.7), decision=decision), np.full(5, 0.2), atol=1e-15
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    level_D = np.ones(3)
    bad_D = np.array([1.0, bad, 1.0])
    with pytest.raises(NonFiniteLossError, match=r"student's validation loss .* 10 .* in code;"):
        loss_differences(_validated(bad_D, level_D), domains=NAMES)
    with pytest.raises(NonFiniteLossError, match=r"teacher's validation loss .* in code;"):
        loss_differences(_validated(level_D, bad_D), domains=NAMES)

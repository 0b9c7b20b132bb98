"""Laws of the narrow types: bounds of their errors, and what they leave exact."""

import numpy as np
import pytest

from shared.encoding import (
    LARGEST,
    in_float16,
    logprobs_from_int8,
    logprobs_in_int8,
    placed_by_id,
    sorted_by_id,
)
from shared.errors import TeacherError


def selection(num: int, k: int, *, spread: float = 4.0, others: int = 500, seed: int = 0):
    """Log-probabilities [N, K] of the likeliest of k + others outcomes, and the rest's mass [N]."""
    logits = np.random.default_rng(seed).normal(size=(num, k + others)) * spread
    logprobs = np.sort(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[:, ::-1]
    tail_N = np.logaddexp.reduce(logprobs[:, k:], axis=1) if others else np.full(num, -np.inf)
    return logprobs[:, :k].astype(np.float32), tail_N.astype(np.float32)


def through_int8(logprobs_NK: np.ndarray, tail_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What comes back, and the size of a step [N]."""
    steps_NK, range_N = logprobs_in_int8(logprobs_NK, tail_N)
    assert (steps_NK.dtype, range_N.dtype) == (np.uint8, np.float16)
    return logprobs_from_int8(steps_NK, range_N, tail_N), range_N.astype(np.float64) / 255


@pytest.mark.parametrize("spread", [1e-3, 0.3, 4.0, 30.0])
@pytest.mark.parametrize("k", [2, 32, 64])
def test_int8_keeps_every_distance_from_the_top_within_half_a_step(k: int, spread: float) -> None:
    sent_NK, tail_N = selection(200, k, spread=spread)
    got_NK, step_N = through_int8(sent_NK, tail_N)
    below_NK, found_NK = (a.astype(np.float64).max(1)[:, None] - a for a in (sent_NK, got_NK))
    # The range is a float16 and the level a float32: their rounding comes on top of half a step.
    bound_NK = step_N[:, None] * 0.63 + 1e-6 + 1e-6 * np.abs(sent_NK)
    assert (np.abs(found_NK - below_NK) <= bound_NK).all()
    assert (np.argmax(got_NK, axis=1) == np.argmax(sent_NK, axis=1)).all()


@pytest.mark.parametrize("others", [0, 1, 500])
def test_int8_leaves_the_kept_mass_exactly_what_the_tail_leaves(others: int) -> None:
    sent_NK, tail_N = selection(200, 16, others=others)
    got_NK, _ = through_int8(sent_NK, tail_N)
    mass_N = np.exp(got_NK.astype(np.float64)).sum(1) + np.exp(tail_N.astype(np.float64))
    np.testing.assert_allclose(mass_N, 1, atol=3e-6)


def test_int8_costs_less_than_a_step_squared_over_8_in_kl() -> None:
    sent_NK, tail_N = selection(400, 64)
    got_NK, step_N = through_int8(sent_NK, tail_N)
    p_NK = np.exp(sent_NK.astype(np.float64))
    kl_N = (p_NK * (sent_NK.astype(np.float64) - got_NK)).sum(1)
    assert (kl_N <= step_N**2 / 8 * 1.1 + 1e-6).all()
    assert 0 < kl_N.mean() < 1e-4


def test_int8_of_one_id_or_of_equal_ones_is_exact() -> None:
    for k in (1, 5):
        sent_NK = np.full((3, k), np.log(0.5 / k), np.float32)
        got_NK, _ = through_int8(sent_NK, np.full(3, np.log(0.5), np.float32))
        np.testing.assert_allclose(got_NK, sent_NK, rtol=1e-6)


def test_int8_stays_finite_where_probabilities_or_what_the_tail_leaves_vanish() -> None:
    sent_NK = np.array([[0, -1e5, -3e38], [-17, -18, -19]], np.float32)
    got_NK, _ = through_int8(sent_NK, np.array([-1e5, 0], np.float32))
    assert np.isfinite(got_NK).all()
    assert got_NK[0, 1] < -LARGEST / 2


def test_int8_refuses_masses_that_do_not_sum_to_one() -> None:
    sent_NK, tail_N = selection(4, 8)
    with pytest.raises(TeacherError, match=r"do not sum to 1.*use fp16"):
        logprobs_in_int8(sent_NK - np.float32(0.5), tail_N)


def test_float16_never_falls_below_its_smallest_number() -> None:
    got = in_float16(np.array([-1e9, -7.0], np.float32))
    np.testing.assert_array_equal(got, np.array([-LARGEST, -7], np.float16))


@pytest.mark.parametrize("k", [1, 2, 3, 64, 1000])
def test_sorting_moves_logprobs_with_their_ids_and_keeps_the_order_of_repeats(k: int) -> None:
    rng = np.random.default_rng(k)
    ids_NK = rng.integers(0, 200_000 if k < 100 else 300, (50, k))
    logprobs_NK = -rng.random((50, k), np.float32)
    order_NK = np.argsort(ids_NK, axis=1, kind="stable")
    found_ids_NK, found_NK = sorted_by_id(ids_NK, logprobs_NK, 200_000)
    np.testing.assert_array_equal(found_ids_NK, np.take_along_axis(ids_NK, order_NK, 1))
    np.testing.assert_array_equal(found_NK, np.take_along_axis(logprobs_NK, order_NK, 1))


@pytest.mark.parametrize("wrong", [-1, 512])
def test_an_id_that_is_not_shared_is_refused(wrong: int) -> None:
    with pytest.raises(TeacherError, match=rf"selected ids .*{wrong}.* of 512 shared"):
        sorted_by_id(np.array([[5, wrong]]), np.zeros((1, 2), np.float32), 512)


def test_a_whole_vocabulary_is_placed_by_id_and_must_be_whole() -> None:
    ids_NV, logprobs_NV = np.array([[2, 0, 1]]), np.array([[-1, -2, -3]], np.float32)
    np.testing.assert_array_equal(placed_by_id(ids_NV, logprobs_NV), [[-2, -3, -1]])
    np.testing.assert_array_equal(placed_by_id(np.array([[0, 1, 2]]), logprobs_NV), logprobs_NV)
    with pytest.raises(TeacherError, match="names an id twice"):
        placed_by_id(np.array([[2, 0, 2]]), logprobs_NV)

"""The projection is the nearest point within bounds, by its optimality conditions."""

import numpy as np
import pytest

from shared.mixture.simplex import projected

EPS = 1e-12


def _problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random weights and bounds around a feasible point, some of them tight."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    feasible_D = rng.dirichlet(np.full(count, 0.5))
    reach_D = rng.uniform(0, 0.2, (2, count)) * rng.integers(0, 2, (2, count))
    low_D = np.maximum(0, feasible_D - reach_D[0])
    high_D = np.minimum(1, feasible_D + reach_D[1])
    return rng.dirichlet(np.full(count, 0.5)), low_D, high_D


@pytest.mark.parametrize("seed", range(200))
def test_a_projection_is_feasible_and_optimal(seed: int) -> None:
    weight_D, low_D, high_D = _problem(seed)
    found_D = projected(weight_D, low_D, high_D)
    assert abs(found_D.sum() - 1) < EPS
    assert (low_D <= found_D).all()
    assert (found_D <= high_D).all()
    # one shift for all that are free; less where the upper bound binds, more where the lower does
    shift_D = weight_D - found_D
    can_fall, can_rise = found_D > low_D + EPS, found_D < high_D - EPS
    if can_fall.any() and can_rise.any():
        assert shift_D[can_fall].min() >= shift_D[can_rise].max() - 1e-10


def test_weights_within_the_bounds_stay_the_same_bits() -> None:
    weight_D = np.random.default_rng(0).dirichlet(np.ones(9))
    assert (projected(weight_D, np.zeros(9), np.ones(9)) == weight_D).all()


def test_a_floor_is_paid_by_the_others_in_equal_parts() -> None:
    found_D = projected(np.array([0.6, 0.38, 0.02]), np.full(3, 0.1), np.ones(3))
    np.testing.assert_allclose(found_D, [0.56, 0.34, 0.1], atol=1e-15)


def test_a_floor_that_leaves_no_choice_is_uniform() -> None:
    found_D = projected(np.array([0.7, 0.2, 0.1]), np.full(3, 1 / 3), np.ones(3))
    np.testing.assert_allclose(found_D, 1 / 3, atol=1e-15)

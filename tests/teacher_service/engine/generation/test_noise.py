"""Noise of the sampler: a known generator, the law it follows, and no other row beside it."""

import numpy as np
import pytest
import torch
from scipy import stats

from teacher_service.engine.generation.noise import gumbel

# The first outputs of SplitMix64 from the state 1234567, as its other implementations have them.
STATE = 1234567
OUTPUTS = (
    *(6457827717110365317, 3203168211198807973, 9817491932198370423),
    *(4593380528125082431, 16408922859458223821),
)


def test_numbers_are_those_of_splitmix64() -> None:
    uniform = np.array([(output % 2**63 + 0.5) / 2**63 for output in OUTPUTS])
    expected = -np.log(-np.log1p(-uniform))
    found = gumbel(torch.tensor([STATE]), len(OUTPUTS))[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)


# States whose first output is small, or 2**63 more: what the last shift does is seen in no other.
SMALL = {
    7046029254386353131: 0,
    -8749660006004907399: 3,
    -161488906591990532: 1000,
    -7644967308679650962: 2**40 + 7,
    3453682501520545093: 0,
    -8854584168537568373: 5,
}


def test_the_smallest_numbers_are_those_of_splitmix64_too() -> None:
    uniform = (np.array([*SMALL.values()]) + 0.5) / 2**63
    found = gumbel(torch.tensor([*SMALL]), 1)[:, 0]
    np.testing.assert_allclose(found.numpy(), -np.log(-np.log1p(-uniform)), rtol=2e-6)


def test_numbers_follow_gumbels_law() -> None:
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 20))
    found = gumbel(keys, 50_000)
    assert stats.kstest(found.flatten().double().numpy(), "gumbel_r").pvalue > 0.01
    off_diagonal = np.corrcoef(found.double().numpy())[np.triu_indices(20, 1)]
    assert np.abs(off_diagonal).max() < 0.02  # 4.5 standard errors
    beside = np.corrcoef(found[:, 1:].flatten(), found[:, :-1].flatten())[0, 1]
    assert abs(beside) < 0.005


@pytest.mark.parametrize("state", [-(2**63), -1, 0, 2**63 - 1])
def test_numbers_are_finite_and_the_same_beside_others(state: int) -> None:
    alone = gumbel(torch.tensor([state]), 1000)[0]
    beside = gumbel(torch.tensor([5, state]), 2_000_000)[1, :1000]
    assert alone.isfinite().all()
    assert torch.equal(alone, beside)

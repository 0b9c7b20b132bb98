"""Means and standard errors of sums over documents.

D documents   B bins of confidence
"""

import numpy as np
import pytest

from cluster.evaluation.statistics import calibration_error, ratio
from shared.run.document_sums import NUM_BINS, bins

GENERATOR = np.random.default_rng(3)


def test_a_ratio_of_equal_weights_is_a_mean_with_its_usual_error() -> None:
    values_D = GENERATOR.normal(size=40)
    found = ratio(values_D, np.ones(40))
    assert found is not None
    assert found.value == pytest.approx(values_D.mean())
    assert found.error == pytest.approx(values_D.std(ddof=1) / np.sqrt(40))


def test_the_error_is_how_much_the_mean_varies_from_sample_to_sample() -> None:
    """Documents of very different lengths, whose tokens are alike inside a document."""
    means, errors = [], []
    for _ in range(600):
        tokens_D = GENERATOR.integers(1, 60, 80)
        sums_D = tokens_D * (2 + GENERATOR.normal(size=80)) + GENERATOR.normal(size=80)
        found = ratio(sums_D, tokens_D)
        assert found is not None
        assert found.error is not None
        means.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_one_document_has_no_error_and_nothing_no_mean() -> None:
    one = ratio(np.array([3.0]), np.array([2]))
    assert one is not None
    assert (one.value, one.error) == (1.5, None)
    assert ratio(np.zeros(0), np.zeros(0)) is None
    assert ratio(np.array([np.nan, 1.0]), np.ones(2)) is None
    assert ratio(np.ones(2), np.zeros(2)) is None


def test_calibration_is_that_of_the_definition() -> None:
    confidence_N = GENERATOR.uniform(0.05, 1, 5000)
    right_N = GENERATOR.uniform(size=5000) < confidence_N**2
    document_N = GENERATOR.integers(0, 30, 5000)
    gap_DB = np.zeros((30, NUM_BINS))
    np.add.at(gap_DB, (document_N, bins(confidence_N)), right_N - confidence_N)
    expected = 0.0
    for number in range(NUM_BINS):
        inside_N = (confidence_N > number / NUM_BINS) & (confidence_N <= (number + 1) / NUM_BINS)
        if inside_N.any():
            gap = right_N[inside_N].mean() - confidence_N[inside_N].mean()
            expected += inside_N.mean() * abs(gap)
    found = calibration_error(gap_DB, np.bincount(document_N))
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.value > 0.1


def test_bins_hold_their_upper_edges() -> None:
    assert bins(np.array([0.0, 1 / 15, 0.0667, 1.0])).tolist() == [0, 0, 1, 14]

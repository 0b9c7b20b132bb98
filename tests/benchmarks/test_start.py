"""The bar of a start: what comes up at the same time costs little more than its dearest part."""

from pathlib import Path

import pytest

from tests.benchmarks.start import measure


@pytest.mark.benchmark
def test_the_first_step_comes_within_one_and_a_half_times_the_bare_cost(
    reference: Path, tmp_path: Path
) -> None:
    found = measure(repeats=2, folder=tmp_path, models=reference / "models")
    assert found.ratio < 1.5, found

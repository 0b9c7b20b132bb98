"""The bars of a start: what comes up at the same time costs little more than its dearest part, with
a service that is up still less, and an end is short."""

from pathlib import Path

import pytest

from tests.benchmarks.start import measure


@pytest.mark.benchmark
def test_the_first_step_comes_within_its_bars(reference: Path, tmp_path: Path) -> None:
    found = measure(repeats=2, folder=tmp_path, models=reference / "models")
    assert found.ratio < 1.5, found
    assert found.product.ending_s < 5, found
    assert found.warm.wall_s < 8, found

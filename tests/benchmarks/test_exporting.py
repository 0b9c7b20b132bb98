"""The bar of the export: less than half a percent of the time of who trains."""

import pytest

from tests.benchmarks.exporting import measure


@pytest.mark.benchmark
def test_exporting_costs_less_than_half_a_percent(ray_cluster: None) -> None:
    cost = measure(domains=10, times=300)
    assert cost.share < 0.005, cost

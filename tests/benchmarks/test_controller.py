"""The bar of the controller: an update with a thousand domains is hardly noticed by rank 0, which
asks for all ranks."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_controller import measure


@pytest.mark.benchmark
def test_an_update_of_a_thousand_domains_takes_under_50_ms(
    ray_cluster: None, tmp_path: Path
) -> None:
    found = measure(domains=1000, decisions=100, ranks=1, folder=tmp_path)
    assert found.median_ms < 50, found

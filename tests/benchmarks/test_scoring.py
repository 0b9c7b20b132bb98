"""The benchmark of scoring runs, and its bars."""

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.scoring import measure


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_measures_three_times(tmp_path):
    found = measure("shallow", tmp_path, rounds=1, tokens=32)
    assert min(found.plain_s, found.scoring_s, found.head_s) > 0


@pytest.mark.benchmark
def test_selection_adds_a_tenth_to_a_deep_model_and_a_head_product_to_a_shallow_one(tmp_path):
    assert measure("deep", tmp_path / "deep", rounds=5).ratio <= 1.10
    assert measure("shallow", tmp_path / "shallow", rounds=5).selection <= 1

"""The benchmark of scoring runs, and its bars."""

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.scoring import SELECTORS, measure


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_measures_three_times_for_each_selector(tmp_path):
    found = measure("shallow", tmp_path, rounds=1, tokens=32)
    assert [result.selector for result in found] == list(SELECTORS)
    assert min(min(r.trunk_s, r.plain_s, r.scoring_s, r.head_s) for r in found) > 0


@pytest.mark.benchmark
def test_selection_adds_a_tenth_to_a_deep_model_and_a_head_product_to_a_shallow_one(tmp_path):
    for name in ("deep", "wide"):
        for deep in measure(name, tmp_path / name, rounds=9):
            assert deep.trunk >= 10, deep
            assert deep.ratio <= 1.10, deep
    for shallow in measure("shallow", tmp_path / "shallow", rounds=9):
        assert shallow.selection <= 1, shallow

"""The benchmark of scoring runs, and its bars."""

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.targets.scoring import SELECTORS, measure


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


# Where a product with the head takes 14 us, drawing 64 ids of 4,096 takes two and a half of them.
MISSED = pytest.mark.xfail(reason="1.10 to 1.13 times a plain forward pass was measured")


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("name", "selector"),
    [
        ("wide", "top_k"),
        ("wide", "threshold"),
        ("deep", "top_k"),
        pytest.param("deep", "threshold", marks=MISSED),
    ],
)
def test_selection_adds_at_most_a_tenth_where_the_trunk_takes_ten_head_products(
    name, selector, tmp_path
):
    (found,) = (r for r in measure(name, tmp_path, rounds=9) if r.selector == selector)
    assert found.trunk >= 10, found
    assert found.ratio <= 1.10, found


@pytest.mark.benchmark
def test_selection_takes_at_most_a_head_product_where_the_trunk_takes_less(tmp_path):
    for found in measure("shallow", tmp_path, rounds=9):
        assert found.selection <= 1, found

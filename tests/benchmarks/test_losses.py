"""The benchmark of the token loss runs, and its bars on one thread: accuracy, time and memory."""

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.losses import VOCABULARIES, WIDTHS, Result, Size, lines, measure


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = Size(rows=24, width=16, vocabulary=300)


def by_name(results: list[Result]) -> dict[str, Result]:
    return {result.name: result for result in results}


@pytest.mark.parametrize("task", ["whole", "64 ids"])
def test_all_that_can_be_called_here_agree_with_float64(task, one_thread):
    found = measure(task, SMALL, rounds=1, compiled=False, memory=False)
    assert {"ours", "eager"} <= set(by_name(found))
    assert all(result.value_error < 1e-5 and result.gradient_error < 1e-5 for result in found)
    assert len(lines(found).splitlines()) == len(found)


@pytest.mark.benchmark
@pytest.mark.parametrize("task", ["whole", "64 ids"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_loss_takes_no_longer_and_no_more_than_full_logits(task, width, vocabulary, one_thread):
    found = by_name(measure(task, Size(512, width, vocabulary), rounds=3, compiled=False))
    ours, eager = found["ours"], found["eager"]
    assert ours.seconds <= 1.05 * eager.seconds, found
    assert ours.extra_bytes <= eager.extra_bytes, found
    assert ours.gradient_error <= 1e-5, found

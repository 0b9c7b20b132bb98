"""The benchmark of the token loss runs, and its bars on one thread: accuracy, time and memory."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.benchmarks.losses import LOSSES, VOCABULARIES, WIDTHS, Result, Size, lines, measure
from tests.telling import telling


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


UNCOMPILED = [name for name in LOSSES if name != "compiled"]
SMALL = Size(rows=24, width=16, vocabulary=300)


def by_name(results: list[Result]) -> dict[str, Result]:
    return {result.name: result for result in results}


@pytest.mark.parametrize("task", telling(["whole", "64 ids"], "64 ids"))
@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.drill)],
)
def test_all_that_can_be_called_here_agree_with_float64(task, dtype, error, one_thread):
    found = measure(task, replace(SMALL, dtype=dtype), rounds=1, names=UNCOMPILED, memory=False)
    assert {"ours", "eager"} <= set(by_name(found))
    assert all(max(result.value_error, result.gradient_error) < error for result in found)
    assert len(lines(found).splitlines()) == len(found)


@pytest.mark.benchmark
@pytest.mark.parametrize("task", ["whole", "64 ids"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_loss_takes_no_longer_and_no_more_than_full_logits(task, width, vocabulary, one_thread):
    found = by_name(measure(task, Size(512, width, vocabulary), rounds=3, names=UNCOMPILED))
    ours, eager = found["ours"], found["eager"]
    assert ours.seconds <= 1.05 * eager.seconds, found
    assert ours.extra_bytes <= eager.extra_bytes, found
    assert ours.gradient_error <= 1e-5, found

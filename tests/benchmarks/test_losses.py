"""The bars of the chunked loss: memory and time against full logits, on one thread."""

import pytest
import torch

from tests.benchmarks.bench_losses import SIZES, measure


@pytest.mark.benchmark
@pytest.mark.parametrize(("width", "vocabulary"), SIZES)
def test_the_chunked_loss_costs_two_chunks_and_the_time_of_full_logits(width, vocabulary):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure(width=width, vocabulary=vocabulary, rows=512, rounds=3)
    finally:
        torch.set_num_threads(threads)
    assert found.extra_chunks <= 2, found
    assert found.ratio <= 1.05, found

"""The bars of the wire: bytes, tokens/s of encoding and decoding on one core, and the error."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.wire import (
    LARGE_VOCAB,
    entropy,
    errors,
    real_costs,
    real_pair,
    synthetic_costs,
    synthetic_logits,
)

BYTES = {
    ("top_k", 64): {"fp16": 245, "int8": 180},
    ("top_k", 32): {"fp16": 130, "int8": 100},
    ("threshold", 32): {"fp16": 130, "int8": 100},
    ("threshold", 64): {"fp16": 245, "int8": 180},
}
KL = {"fp16": 1e-6, "int8": 5e-5}
ANGLE = {"fp16": 0.05, "int8": 0.5}


@pytest.mark.benchmark
def test_the_wire_is_small_quick_and_close(reference: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        real = real_pair(reference, tmp_path, rows=2)
        logits_NV = synthetic_logits(real.logits_NV, vocab=LARGE_VOCAB, num=32)
        assert abs(float(entropy(logits_NV).mean() - entropy(real.logits_NV).mean())) < 1
        wide = synthetic_costs(logits_NV, rounds=3)
        found = [*wide, *real_costs(real, rounds=3)]
    finally:
        torch.set_num_threads(threads)
    for cost in (c for c in wide if c.ids == "elias_fano" and c.encoding != "fp32"):
        assert cost.num_bytes <= BYTES[cost.selector, cost.k][cost.encoding], cost
    for cost in (c for c in found if c.ids == "elias_fano"):
        assert cost.tokens_per_s >= 100_000, cost
        assert cost.share <= 0.05, cost
    for error in (error for k in (64, 32) for error in errors(real, k)):
        assert error.mean_kl <= KL[error.encoding], error
        assert error.angle <= ANGLE[error.encoding], error

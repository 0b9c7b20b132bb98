"""The bars of the wire: bytes, tokens/s of encoding and decoding on one core, and the error."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.benchmarks.targets.scenes import (
    LARGE_VOCAB,
    Pair,
    entropy,
    read_pair,
    reference_models,
    synthetic_scene,
)
from tests.benchmarks.targets.wire import Cost, errors, pair_costs, synthetic_costs

BYTES = {
    ("top_k", 64): {"fp16": 245, "int8": 180},
    ("top_k", 32): {"fp16": 130, "int8": 100},
    ("threshold", 32): {"fp16": 130, "int8": 100},
    ("threshold", 64): {"fp16": 245, "int8": 180},
}
KL = {"fp16": 1e-6, "int8": 5e-5}
ANGLE = {"fp16": 0.05, "int8": 0.5}
TOKENS_PER_S, SHARE = 100_000, 0.05


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """What is timed is timed on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def real(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The reference pair on two validation rows of each domain."""
    cache = tmp_path_factory.mktemp("cache")
    return read_pair(reference, cache, reference_models(reference), rows=2)


def refuse_slow(found: list[Cost]) -> None:
    """The bars on time hold for the way that ids travel."""
    for cost in (c for c in found if c.ids == "elias_fano"):
        assert cost.tokens_per_s >= TOKENS_PER_S, cost
        assert cost.share <= SHARE, cost


def refuse_large(found: list[Cost]) -> None:
    """The bars on bytes, label and tail included, what a row costs apart."""
    for cost in (c for c in found if c.ids == "elias_fano" and c.encoding != "fp32"):
        assert cost.num_bytes <= BYTES[cost.selector, cost.k][cost.encoding], cost


@pytest.mark.benchmark
def test_a_vocabulary_of_152_k_is_small_and_quick_on_the_wire(real: Pair) -> None:
    scene = synthetic_scene(real.scene, num=32)
    assert scene.vocab == LARGE_VOCAB
    assert abs(float(entropy(scene.teacher_NV).mean() - entropy(real.scene.teacher_NV).mean())) < 1
    found = synthetic_costs(scene.teacher_NV, rounds=3)
    refuse_large(found)
    refuse_slow(found)


@pytest.mark.benchmark
def test_the_reference_teacher_is_small_quick_and_close_on_the_wire(real: Pair) -> None:
    found = pair_costs(real, rounds=3)
    refuse_large(found)
    refuse_slow(found)
    for error in (error for k in (64, 32) for error in errors(real, k)):
        assert error.mean_kl <= KL[error.encoding], error
        assert error.angle <= ANGLE[error.encoding], error


@pytest.mark.benchmark
def test_the_widest_teacher_of_this_text_is_small_and_quick_on_the_wire(
    reference: Path, tmp_path: Path, wide_models: dict[str, Path]
) -> None:
    wide = read_pair(reference, tmp_path, wide_models, rows=2)
    assert wide.scene.vocab >= 32_000
    found = pair_costs(wide, rounds=3)
    refuse_large(found)
    refuse_slow(found)

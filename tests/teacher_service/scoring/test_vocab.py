"""Selection and drawing on the shards of a head: what the whole head gives.

N positions   V head rows   D hidden width
"""

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead, Selection, select
from teacher_service.scoring.vocab import VocabShard
from tests.allocations import largest_tensor

HEADS = {
    "plain": {},
    "bias, scale and cap": {"bias": True, "logit_scale": 0.7, "soft_cap": 4.0},
    "bfloat16, with many ties": {"dtype": torch.bfloat16},
}


def make(vocab: int, *, bias=False, dtype=torch.float32, num: int = 40, **head):
    """Hidden states, a head and labels."""
    torch.manual_seed(vocab)
    weight_VD = torch.randn(vocab, 16).to(dtype)
    bias_V = torch.randn(vocab) if bias else None
    hidden_ND = torch.randn(num, 16).to(dtype)
    return hidden_ND, ScoringHead(weight_VD, bias_V, **head), torch.randint(0, vocab, (num,))


def shard_of(head: ScoringHead) -> ScoringHead:
    """The rows of this process."""
    rank, size, rows = dist.get_rank(), dist.get_world_size(), len(head.weight_VD)
    widest = -(-rows // size)
    part = slice(rank * widest, min(rows, (rank + 1) * widest))
    shard = VocabShard(rows, part.start, part.stop - part.start, dist.group.WORLD)
    bias_V = None if head.bias_V is None else head.bias_V[part]
    return replace(head, weight_VD=head.weight_VD[part], bias_V=bias_V, shard=shard)


def on_shards(kernel, hidden_ND, head, label_N, asked) -> Selection:
    return kernel(hidden_ND, shard_of(head), label_N, **asked)


def compared(two_ranks, kernel, vocab: int, head: str, **asked) -> Selection:
    """The selection of the first rank, which is that of the others and of the whole head."""
    hidden_ND, whole, label_N = make(vocab, **HEADS[head])
    expected = kernel(hidden_ND, whole, label_N, **asked)
    first, *others = two_ranks.call(on_shards, kernel, hidden_ND, whole, label_N, asked)
    for field in fields(Selection):
        one, same = getattr(first, field.name), getattr(expected, field.name)
        if not isinstance(same, Tensor):
            assert one is None
            continue
        assert all(torch.equal(getattr(other, field.name), one) for other in others)
        torch.testing.assert_close(one, same, rtol=0, atol=0 if "ids" in field.name else 1e-5)
    return first


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("num_ids", [1, 7, 60])
@pytest.mark.parametrize("shared", [97, 90, 31])  # of the last only the first rank holds any
def test_the_likeliest_ids_of_shards_are_those_of_the_whole(two_ranks, head, num_ids, shared):
    if num_ids > shared:
        num_ids = shared  # all of them, in order
    asked = {"temperatures": (1.0, 2.0, 0.5), "entropy": True, "chunk": 16}
    found = compared(two_ranks, select, 97, head, num_ids=num_ids, shared_vocab=shared, **asked)
    assert (found.ids_NK < shared).all()


@pytest.mark.parametrize("head", ["plain", "bias, scale and cap"])
def test_those_of_a_vocabulary_that_is_looked_through_in_groups(two_ranks, head):
    compared(two_ranks, select, 5001, head, num_ids=20, shared_vocab=5000, entropy=True)


@pytest.mark.parametrize("head", HEADS)
def test_ids_that_the_student_names_come_from_any_shard(two_ranks, head):
    named_NM = torch.stack([torch.randperm(97)[:5] for _ in range(40)])
    found = compared(two_ranks, select, 97, head, num_ids=12, shared_vocab=97, named_NM=named_NM)
    assert torch.equal(found.ids_NK[:, :5], named_NM)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "shared"), [(97, 97), (97, 31), (160, 160), (5001, 5000)])
@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_the_ids_drawn_from_shards_are_those_of_the_whole(
    two_ranks, selector, vocab, shared, temperature, head
):
    numbers = torch.Generator().manual_seed(1)
    uniform_NU = torch.rand(
        40, 1 if selector == "threshold" else 12, dtype=torch.float64, generator=numbers
    )
    compared(
        two_ranks,
        draw,
        vocab,
        head,
        uniform_NU=uniform_NU,
        selector=selector,
        num_ids=12,
        shared_vocab=shared,
        temperature=temperature,
    )


def test_more_ids_than_a_shard_holds(two_ranks):
    uniform_NU = torch.rand(40, 1, dtype=torch.float64)
    asked = {"selector": "threshold", "num_ids": 60, "shared_vocab": 97}
    compared(two_ranks, draw, 97, "plain", uniform_NU=uniform_NU, **asked)


def _largest_of_shards(vocab: int, num: int) -> int:
    hidden_ND, head, label_N = make(vocab, num=num)
    head = shard_of(head)
    return largest_tensor(
        lambda: select(hidden_ND, head, label_N, num_ids=8, shared_vocab=vocab, entropy=True)
    )


def test_no_tensor_holds_the_logits_of_all_ids(two_ranks):
    vocab, num = 40_000, 16
    assert max(two_ranks.call(_largest_of_shards, vocab, num)) <= num * vocab // 2

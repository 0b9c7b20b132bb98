"""Selection and masses against dense float64, and what it allocates."""

import math

import pytest
import torch

from teacher_service.scoring.largest import largest
from teacher_service.scoring.scoring import ScoringHead, chunk_size, select
from tests.allocations import largest_tensor

# N positions   V head rows   D hidden width   K ids kept
N, V, D, K = 70, 301, 16, 8


def problem(**head):
    torch.manual_seed(0)
    weight_VD = torch.randn(V, D)
    return torch.randn(N, D), ScoringHead(weight_VD, **head), torch.randint(0, V, (N,))


def dense_logits(hidden_ND, head):
    logits_NV = hidden_ND.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_NV += head.bias_V.double()
    logits_NV *= head.logit_scale
    if head.soft_cap is not None:
        logits_NV = torch.tanh(logits_NV / head.soft_cap) * head.soft_cap
    return logits_NV


HEADS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-2, 2, V)},
    "scaled": {"logit_scale": 0.25},
    "soft_capped": {"logit_scale": 2.0, "soft_cap": 7.0},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shared_vocab", [V, 200])
def test_selection_and_masses_equal_dense_float64(kind, shared_vocab):
    hidden_ND, head, label_N = problem(**HEADS[kind])
    temperatures = (1.0, 0.5, 3.0)
    found = select(
        hidden_ND,
        head,
        label_N,
        num_ids=K,
        shared_vocab=shared_vocab,
        temperatures=temperatures,
        chunk=16,
    )
    logits_NV = dense_logits(hidden_ND, head)
    logp_NV = logits_NV.log_softmax(1)
    ids_NK = logits_NV[:, :shared_vocab].topk(K).indices
    assert torch.equal(found.ids_NK, ids_NK)
    close = {"atol": 3e-6, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(found.logprobs_NK, logp_NV.gather(1, ids_NK), **close)
    label_N1 = label_N[:, None]
    torch.testing.assert_close(found.label_logprob_N, logp_NV.gather(1, label_N1)[:, 0], **close)
    for column, temperature in enumerate(temperatures):
        at_T_NV = (logits_NV / temperature).log_softmax(1)
        tail_N = at_T_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        torch.testing.assert_close(found.log_tail_NS[:, column], tail_N, atol=1e-5, rtol=1e-6,
                                   check_dtype=False)  # fmt: skip


def test_the_tail_is_exact_where_one_minus_the_sum_is_not():
    """On peaked positions 1 - sum(p) in float32 has no correct digit left."""
    hidden_ND, head, label_N = problem(logit_scale=4.0)
    found = select(hidden_ND, head, label_N, num_ids=K, shared_vocab=V)
    logp_NV = dense_logits(hidden_ND, head).log_softmax(1)
    tail_N = logp_NV.scatter(1, found.ids_NK, -torch.inf).logsumexp(1)
    inferred_N = torch.log1p(-found.logprobs_NK.exp().sum(1).clamp(max=1.0))
    assert (inferred_N - tail_N).abs().max() > 0.1
    assert (found.log_tail_NS[:, 0] - tail_N).abs().max() < 1e-4


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 1.0, 30.0])  # from flat to one id alone
def test_the_entropy_is_float64s_of_the_same_logits_over_all_rows(kind, sharpness):
    hidden_ND, head, label_N = problem(**HEADS[kind])
    hidden_ND = hidden_ND * sharpness
    asked = {"num_ids": K, "shared_vocab": 200, "chunk": 16}
    found = select(hidden_ND, head, label_N, entropy=True, **asked)
    logp_NV = head.logits(hidden_ND).double().log_softmax(1)
    expected_N = -(logp_NV.exp() * logp_NV).sum(1)
    if sharpness == 0 and head.bias_V is None:
        assert expected_N.max() == pytest.approx(math.log(V), abs=1e-9)
    assert found.entropy_N is not None
    torch.testing.assert_close(found.entropy_N, expected_N, atol=2e-6, rtol=0, check_dtype=False)
    without = select(hidden_ND, head, label_N, **asked)
    assert without.entropy_N is None
    assert torch.equal(without.log_tail_NS, found.log_tail_NS)


def test_the_entropy_is_that_of_a_selection_of_everything():
    hidden_ND, head, label_N = problem()
    found = select(hidden_ND, head, label_N, num_ids=V, shared_vocab=V, entropy=True)
    logp_NK = found.logprobs_NK.double()
    torch.testing.assert_close(
        found.entropy_N, -(logp_NK.exp() * logp_NK).sum(1), atol=5e-6, rtol=0, check_dtype=False
    )


def test_a_row_of_the_head_that_is_ruled_out_adds_no_entropy():
    hidden_ND, head, label_N = problem(bias_V=torch.zeros(V))
    head.bias_V[100:] = -torch.inf
    found = select(hidden_ND, head, label_N % 100, num_ids=K, shared_vocab=100, entropy=True)
    logp_NV = dense_logits(hidden_ND, head)[:, :100].log_softmax(1)
    expected_N = -(logp_NV.exp() * logp_NV).sum(1)
    torch.testing.assert_close(found.entropy_N, expected_N, atol=5e-6, rtol=0, check_dtype=False)


def test_padding_rows_are_never_selected_and_their_mass_is_tail():
    hidden_ND, head, label_N = problem()
    loud_VD = head.weight_VD.clone()
    loud_VD[290:] *= 5
    found = select(hidden_ND, ScoringHead(loud_VD), label_N % 290, num_ids=K, shared_vocab=290)
    assert found.ids_NK.max() < 290
    total_N = torch.cat([found.logprobs_NK, found.log_tail_NS], 1).logsumexp(1)
    torch.testing.assert_close(total_N, torch.zeros(N), atol=1e-5, rtol=0)
    assert found.log_tail_NS.mean() > found.logprobs_NK[:, 0].mean()


def test_the_whole_vocabulary_leaves_no_tail():
    hidden_ND, head, label_N = problem()
    found = select(hidden_ND, head, label_N, num_ids=V, shared_vocab=V, temperatures=(1.0, 2.0))
    assert torch.isneginf(found.log_tail_NS).all()
    assert torch.equal(found.ids_NK.sort(1).values, torch.arange(V).expand(N, V))


@pytest.mark.parametrize("named_NM", [None, torch.arange(4).expand(512, 4)])
def test_no_tensor_of_positions_times_vocabulary_is_allocated(named_NM):
    hidden_ND, head, label_N = (
        torch.randn(512, D),
        ScoringHead(torch.randn(4000, D)),
        torch.zeros(512),
    )
    largest = largest_tensor(
        lambda: select(
            hidden_ND,
            head,
            label_N.long(),
            num_ids=K,
            shared_vocab=3000,
            temperatures=(1.0, 2.0),
            entropy=True,
            named_NM=named_NM,
            chunk=32,
        )
    )
    assert largest == 32 * 4000


def test_a_chunk_of_a_large_vocabulary_stays_small():
    assert chunk_size(151_936, "cpu") * 151_936 * 4 <= 32 * 2**20
    assert chunk_size(151_936, "cuda") * 151_936 * 4 <= 256 * 2**20


def test_no_position_gives_empty_tensors():
    _, head, label_N = problem()
    found = select(torch.zeros(0, D), head, label_N[:0], num_ids=K, shared_vocab=V)
    assert found.ids_NK.shape == (0, K)
    assert found.log_tail_NS.shape == (0, 1)


@pytest.mark.parametrize("vocab", [3, 64, 257, 1_000, 32_003])
@pytest.mark.parametrize("size", [0, 1, 2, 31, 64])
@pytest.mark.parametrize("kind", ["normal", "equal", "few values", "mostly nothing"])
def test_the_largest_are_those_of_topk(vocab, size, kind):
    """Distinct ids with the same values in the same order; the ids themselves where none are
    equal."""
    torch.manual_seed(0)
    logits_CV = torch.randn(9, vocab)
    if kind == "equal":
        logits_CV.zero_()
    if kind == "few values":
        logits_CV.round_()
    if kind == "mostly nothing":
        logits_CV.masked_fill_(torch.rand(9, vocab) < 0.9, -torch.inf)
    size = min(size, vocab)
    (values_CK, ids_CK), exact = largest(logits_CV, size), logits_CV.topk(size)
    assert torch.equal(values_CK, exact.values)
    assert torch.equal(logits_CV.gather(1, ids_CK), values_CK)
    assert all(len(set(row)) == size for row in ids_CK.tolist())
    if kind == "normal":
        assert torch.equal(ids_CK, exact.indices)


def named_ids(count, *, below):
    """Ids that differ from each other at every position, likely or not."""
    torch.manual_seed(1)
    return torch.rand(N, below).topk(count).indices


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shared_vocab", [V, 200])
def test_named_ids_come_first_and_the_masses_are_those_outside_all(kind, shared_vocab):
    hidden_ND, head, label_N = problem(**HEADS[kind])
    named_NM, temperatures = named_ids(5, below=shared_vocab), (1.0, 0.5, 3.0)
    asked = {"shared_vocab": shared_vocab, "temperatures": temperatures, "entropy": True}
    found = select(hidden_ND, head, label_N, num_ids=5 + K, named_NM=named_NM, chunk=16, **asked)
    logits_NV = dense_logits(hidden_ND, head)
    others_NV = logits_NV.scatter(1, named_NM, -torch.inf)[:, :shared_vocab]
    ids_NK = torch.cat([named_NM, others_NV.topk(K).indices], dim=1)
    assert torch.equal(found.ids_NK, ids_NK)
    close = {"atol": 1e-5, "rtol": 1e-6, "check_dtype": False}
    logp_NV = logits_NV.log_softmax(1)
    torch.testing.assert_close(found.logprobs_NK, logp_NV.gather(1, ids_NK), **close)
    for column, temperature in enumerate(temperatures):
        at_T_NV = (logits_NV / temperature).log_softmax(1)
        tail_N = at_T_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        torch.testing.assert_close(found.log_tail_NS[:, column], tail_N, **close)
    without = select(hidden_ND, head, label_N, num_ids=K, chunk=16, **asked)
    torch.testing.assert_close(found.label_logprob_N, without.label_logprob_N)
    torch.testing.assert_close(found.entropy_N, without.entropy_N)


def test_naming_ids_changes_nothing_where_all_are_kept_or_the_likeliest_are_named():
    hidden_ND, head, label_N = problem()
    for top_k, named_NM in ((V, named_ids(9, below=V)), (K, head.logits(hidden_ND).topk(3)[1])):
        plain, named = (
            select(hidden_ND, head, label_N, num_ids=top_k, shared_vocab=V, named_NM=ids)
            for ids in (None, named_NM)
        )
        assert torch.equal(named.ids_NK, plain.ids_NK)
        assert torch.equal(named.logprobs_NK, plain.logprobs_NK)
        assert torch.equal(named.log_tail_NS, plain.log_tail_NS)

"""Groups of tokens as outcomes: values and gradients of a dense computation, and what they leave
alone.

N positions   D width   V vocabulary   G groups
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.losses.across.matched import ByBytes
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import TokenLosses, token_losses
from tests import tiny
from tests.student_trainer.losses.across.subjects import FEW, Across, across, tokenizer
from tests.student_trainer.losses.across.test_across import (
    assert_same_gradients,
    begun,
    diverges,
    exact,
    student_of,
)
from tests.student_trainer.losses.dense import cross_entropy_term, forward_kl_term

P_G = [0.5, 0.25, 0.15]  # a teacher's masses of groups 0, 2 and 3
NAMES_G = torch.tensor([0, 2, 3])
GROUP_V = torch.tensor([0, 0, 2, 3, 2, 2, 6, 3])  # of ids 0 to 7; 6 is no group of the teacher's


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Across:
    """A teacher with fewer and shorter tokens, and the groups of both."""
    return across(tmp_path_factory.mktemp("grouped"), teacher_vocab=FEW, in_groups=True)


@pytest.mark.parametrize("top_k", [8, FEW])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "total_variation"])
def test_values_and_gradients_are_those_of_a_dense_computation(
    other: Across, kind: str, top_k: int
) -> None:
    answer = other.answer(top_k)
    objective = other.objective(losses=[{"kind": kind}], cross_tokenizer="grouped")
    objective.double()
    loss, _, _ = objective(exact(other.batch(answer)))
    loss.backward()
    model = student_of(other)
    expected = dense_grouped(other, answer, model, kind)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_same_gradients(objective, model)


def dense_grouped(case: Across, answer: Any, model: Any, kind: str) -> Tensor:
    """The sum over places that both models' next tokens begin at, by tokens as each tokenizer's own
    merges read the other's."""
    own, others = tokenizer(tiny.VOCAB), tokenizer(case.teacher_vocab)
    known, theirs = own.get_vocab(), others.get_vocab()
    short = set(known) & set(theirs)

    def group(token: str) -> str | None:
        while token not in short:
            reader = others if token in known else own
            read = [part.value for part in reader.backend_tokenizer.model.tokenize(token)]
            if not read or token in (own.pad_token, own.unk_token):
                return None
            token = read[0]
        return token

    groups = {index: group(token) for token, index in known.items()}
    of_teacher = {index: group(token) for token, index in theirs.items()}
    names = [*sorted({*groups.values(), *of_teacher.values()} - {None}), None]
    number = {name: at for at, name in enumerate(names)}
    own_V = torch.tensor([number[groups.get(index)] for index in range(tiny.VOCAB)])
    none_G, total = torch.zeros(len(names), dtype=torch.double), torch.zeros((), dtype=torch.double)
    for logprob, labels, begins, kept in begun(case, answer, model):
        for students, teachers in begins:
            at, where = students[0], teachers[0]
            if groups[int(labels[at])] != of_teacher[int(kept["labels"][where])]:
                continue
            told_K = torch.tensor([number[of_teacher[int(index)]] for index in kept["ids"][where]])
            mass_G = none_G.index_add(0, told_K, kept["logprobs"][where].exp())
            q_G = none_G.index_add(0, own_V, logprob[at].exp().double())
            tail_p = kept["tail"][where][-1].exp()
            p_G = mass_G * (1 - tail_p) / mass_G.sum()
            named = [at for at in told_K.unique().tolist() if names[at] is not None]
            p, q = p_G[named], q_G[named]
            if {names[at] for at in named} == set(groups.values()):
                p = p / p.sum()  # no student's token is left for the rest
            else:
                p, q = [*p, tail_p + p_G[-1]], [*q, 1 - q.sum()]
            total = total + diverges([*p], [*q], kind)
    return total


def losses_of(logits_NV: Tensor, targets: ByBytes, label_N: Tensor, *terms: Any) -> TokenLosses:
    """Of logits, which are the states of a head that does nothing."""
    head = Head(torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype))
    named = terms_of(terms or [forward_kl_term()])
    return token_losses(logits_NV, head, label_N=label_N, terms=named, targets=targets)


def targets_of(p_NG: Tensor, names_G: Tensor) -> ByBytes:
    """A teacher of so much mass of each group; the rest is its tail."""
    shape = p_NG.shape
    tail_N1 = (1 - p_NG.sum(-1, keepdim=True)).log()
    absent_NG = torch.zeros(shape, dtype=torch.bool)
    return ByBytes(names_G.expand(shape), absent_NG, p_NG.log(), tail_N1, (1.0,), None, GROUP_V)


@pytest.fixture
def teacher() -> ByBytes:
    return targets_of(torch.tensor([P_G], dtype=torch.double), NAMES_G)


def test_golden_values_of_groups(teacher) -> None:
    """By hand: q of eight ids is 1/8 each, so that groups have 2/8, 3/8, 2/8 and the rest 1/8."""
    logits_NV = torch.zeros(1, 8, dtype=torch.double, requires_grad=True)
    found = losses_of(logits_NV, teacher, torch.tensor([4]))
    found.loss.backward()
    p, q = np.array([0.5, 0.25, 0.15, 0.1]), np.array([2, 3, 2, 1]) / 8
    assert float(found.loss.detach()) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)
    assert float(found.loss.detach()) == pytest.approx(0.146269, abs=5e-7)
    slopes = (q - p) / [2, 3, 2, 1]  # in equal shares on ids that are equally likely
    expected = slopes[[0, 0, 1, 2, 1, 1, 3, 2]]
    assert logits_NV.grad is not None
    np.testing.assert_allclose(logits_NV.grad[0], expected, atol=1e-12)


def test_mass_moved_within_a_group_changes_nothing(teacher) -> None:
    q_V = torch.tensor([0.1, 0.2, 0.05, 0.3, 0.1, 0.05, 0.15, 0.05], dtype=torch.double)
    moved = [0.09, -0.09, 0.02, -0.25, 0.02, -0.04, 0.0, 0.25]
    moved_V = q_V + torch.tensor(moved, dtype=torch.double)
    one, other = (
        losses_of(q[None].log(), teacher, torch.tensor([0]), forward_kl_term()).terms["forward_kl"]
        for q in (q_V, moved_V)
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_token_has_the_share_of_its_groups_gradient_that_it_has_of_the_mass(teacher) -> None:
    """So that no token which the student does not use is moved towards."""
    logits_NV = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double() * 3
    logits_NV[0, 4] = -40.0  # a token that the student never uses
    logits_NV.requires_grad_()
    losses_of(logits_NV, teacher, torch.tensor([0])).loss.backward()
    assert logits_NV.grad is not None
    ratio_V = (logits_NV.grad / logits_NV.detach().softmax(-1))[0]
    for name in (0, 2, 3):
        own = ratio_V[name == GROUP_V]
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=1e-9, atol=1e-12)
    assert abs(float(logits_NV.grad[0, 4])) < 1e-15


def test_a_student_whose_groups_have_the_teachers_mass_is_at_the_optimum(teacher) -> None:
    q_V = torch.tensor([0.49, 0.01, 0.05, 0.15 - 1e-3, 0.1, 0.1, 0.1, 1e-3], dtype=torch.double)
    logits_NV = q_V[None].log().requires_grad_()
    found = losses_of(logits_NV, teacher, torch.tensor([0]))
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(0, abs=1e-12)
    assert logits_NV.grad is not None
    assert float(logits_NV.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("head", ["plain", "biased", "scaled", "capped"])
def test_gradients_through_every_head_are_those_of_autograd(teacher, head: str) -> None:
    random = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(3, 5, generator=random, dtype=torch.double).requires_grad_()
    weight_VD = torch.randn(8, 5, generator=random, dtype=torch.double).requires_grad_()
    bias_V = torch.randn(8, generator=random, dtype=torch.double).requires_grad_()
    options = {"biased": {"bias_V": bias_V}, "scaled": {"logit_scale": 0.7}}
    made = Head(weight_VD, **(options | {"capped": {"soft_cap": 2.0}}).get(head, {}))
    label_N = torch.tensor([1, 4, 6])
    targets = targets_of(torch.tensor([P_G] * 3, dtype=torch.double), NAMES_G)
    terms = [forward_kl_term(), cross_entropy_term(weight=0.5)]
    inputs = [hidden_ND, weight_VD, *([bias_V] if head == "biased" else [])]
    found = token_losses(
        hidden_ND, made, label_N=label_N, terms=terms_of(terms), targets=targets, chunk_rows=2
    )
    own = torch.autograd.grad(found.loss, inputs)
    log_q_NV = made.logits(hidden_ND).log_softmax(-1)
    q_NG = torch.stack([log_q_NV.exp()[:, name == GROUP_V].sum(-1) for name in (0, 2, 3, 6)], -1)
    p_NG = torch.cat([targets.logprobs_NK, targets.log_tail_NS], -1).exp()
    kl = (p_NG * (p_NG.log() - q_NG.log())).sum()
    expected = kl - 0.5 * log_q_NV.gather(1, label_N[:, None]).sum()
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(own, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_group_that_the_student_excludes_has_a_finite_value_and_gradient(teacher, kind) -> None:
    logits_NV = torch.zeros(1, 8, dtype=kind)
    logits_NV[0, [0, 1]] = -2000.0
    logits_NV.requires_grad_()
    found = losses_of(logits_NV, teacher, torch.tensor([3]))
    found.loss.backward()
    assert logits_NV.grad is not None
    assert float(found.loss.detach()) == pytest.approx(0.5 * 80, rel=0.02)
    assert torch.isfinite(logits_NV.grad).all()


def test_where_every_group_is_kept_the_student_has_no_rest() -> None:
    """And what the teacher says of no token of the student's is left out."""
    p_NG = torch.tensor([[0.5, 0.2, 0.2, 0.05]], dtype=torch.double)
    targets = targets_of(p_NG, torch.tensor([0, 2, 3, 6]))
    logits_NV = torch.zeros(1, 8, dtype=torch.double, requires_grad=True)
    found = losses_of(logits_NV, targets, torch.tensor([4]))
    p_G, q_G = p_NG[0].numpy() / 0.95, np.array([2, 3, 2, 1]) / 8
    assert float(found.loss.detach()) == pytest.approx((p_G * np.log(p_G / q_G)).sum(), rel=1e-9)


def test_nothing_is_compared_where_the_text_goes_on_in_two_groups(other: Across) -> None:
    """As where the teacher's token of the text had another group."""
    answer, pair = other.answer(8), other.pair
    batch = other.batch(answer)
    assert pair.group_V is not None
    names_N = pair.group_V[batch["label_N"]]
    compared_N = ~batch["absent_NK"].all(-1).numpy()
    lost = names_N[compared_N][0]
    another = np.setdiff1d(names_N[compared_N], [lost])[0]
    moved_W = np.where(pair.student_of_W == lost, another, pair.student_of_W)
    found = replace(other, pair=replace(pair, student_of_W=moved_W)).batch(answer)
    now_N = ~found["absent_NK"].all(-1).numpy()
    assert not now_N[names_N == lost].any()
    assert np.array_equal(now_N[names_N != lost], compared_N[names_N != lost])

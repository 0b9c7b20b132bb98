"""ATKD on buckets: golden values, the identity it splits KL by, its gradients, and its limits.

N positions   V vocabulary   K ids kept per position
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from student_trainer.losses.kernel.labelled import labelled_student
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.terms.token_adaptive import decoupled
from student_trainer.losses.token_losses import TokenLosses
from tests.student_trainer.losses.dense import (
    Case,
    cross_entropy_term,
    forward_kl_term,
    gradients,
    relative_error,
)

F64 = torch.float64
BOTH = pytest.mark.parametrize("direction", ["forward", "reverse"])


def atkd_term(direction: str = "forward", *, weight: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(kind="atkd", weight=weight, direction=direction)


def golden(k: int) -> Case:
    """One position of a five-word vocabulary with the label 1."""
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], dtype=F64)
    q = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1]], dtype=F64)
    case = Case.random(1, width=5, vocabulary=5)
    head = replace(case.head, weight_VD=torch.eye(5, dtype=F64).requires_grad_())
    assert k <= 5
    return Case(q.log().requires_grad_(), head, p.log(), torch.tensor([1]))


def shipped(case: Case, k: int) -> TeacherTargets:
    log_p_NV = case.teacher_NV.log_softmax(-1)
    label_N = log_p_NV.gather(1, case.label_N[:, None])[:, 0]
    targets = case.targets(k)
    return replace(targets, label_logprob_N=label_N.to(targets.logprobs_NK.dtype))


def classes_of(case: Case, *, hard: bool | None = None) -> dict[str, Tensor]:
    """All hard, all easy, or every second one hard; weights of 0.5, 0.6, ... by position."""
    count = len(case.label_N)
    alternating_N = torch.arange(count) % 2 == 0
    hard_N = alternating_N if hard is None else torch.full((count,), hard)
    return {"hard_N": hard_N, "class_weight_N": 0.5 + 0.1 * torch.arange(count, dtype=F64)}


def losses(case: Case, k: int, *, direction: str = "forward", **options) -> TokenLosses:
    options.setdefault("terms", [atkd_term(direction)])
    options.setdefault("columns", classes_of(case))
    return case.losses(targets=shipped(case, k), **options)


def dense(case: Case, k: int, *, direction: str = "forward") -> dict[str, Tensor]:
    """UNC, TKD, DKD by position from whole distributions; DKD over merged outcomes."""
    student_NV = case.head.logits(case.hidden_ND)
    p_NV, q_NV = case.teacher_NV.softmax(-1), student_NV.softmax(-1)
    kept_NK = case.teacher_NV.topk(k).indices
    found: dict[str, list[Tensor]] = {"uncertainty": [], "tkd": [], "dkd": []}
    for p_V, q_V, g, kept_K in zip(p_NV, q_NV, case.label_N, kept_NK, strict=True):
        a_V, b_V = (p_V, q_V) if direction == "forward" else (q_V, p_V)
        others = torch.ones_like(p_V, dtype=torch.bool)
        others[kept_K], others[g] = False, False
        own_K = kept_K[kept_K != g]
        pair = []
        for x_V in (a_V, b_V):
            parts = [x_V[own_K]]
            if others.any():
                parts.append(x_V[others].sum()[None])
            pair.append(torch.cat(parts) / (1 - x_V[g]))
        a, b = pair
        found["uncertainty"].append(1 - a_V[g])
        rest = (1 - a_V[g]) * torch.log((1 - a_V[g]) / (1 - b_V[g]))
        found["tkd"].append(a_V[g] * torch.log(a_V[g] / b_V[g]) + rest)
        found["dkd"].append((a * (a / b).log()).sum())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize(("k", "kl", "dkd"), [(2, 0.088015169, 0.077853845), (5, 0.09651012, None)])
def test_the_parts_have_the_published_values(k, kl, dkd):
    found = losses(golden(k), k)
    assert found.kl_N is not None
    assert found.kl_N.item() == pytest.approx(kl, abs=1e-8)
    assert found.reports["uncertainty"].item() == pytest.approx(0.8, abs=1e-9)
    assert found.reports["tkd"].item() == pytest.approx(0.025732092, abs=1e-8)
    assert found.reports["dkd"].item() == pytest.approx(dkd or 0.088472535, abs=1e-8)


@BOTH
@pytest.mark.parametrize("k", [1, 8, 100, 101])
def test_loss_and_gradients_equal_dense_float64(direction, k):
    case = Case.random(bias=True, soft_cap=6.0)
    classes = classes_of(case)
    terms = [atkd_term(direction, weight=0.7), cross_entropy_term(weight=0.3)]
    found = losses(case, k, terms=terms, columns=classes, multiplier=0.1, chunk_rows=10)
    expected = dense(case, k, direction=direction)
    for name, value_N in expected.items():
        torch.testing.assert_close(found.reports[name], value_N.detach(), atol=1e-7, rtol=1e-6)
    parts_N = expected["dkd"] + torch.where(classes["hard_N"], expected["tkd"], 0)
    nll_N = torch.nn.functional.cross_entropy(
        case.head.logits(case.hidden_ND), case.label_N, reduction="none"
    )
    total = 0.1 * (0.7 * classes["class_weight_N"] * parts_N + 0.3 * nll_N).sum()
    torch.testing.assert_close(found.loss, total, atol=1e-7, rtol=1e-7)
    pairs = zip(gradients(found.loss, case), gradients(total, case), strict=True)
    assert all(relative_error(one, other) < 1e-6 for one, other in pairs)


@pytest.mark.parametrize("k", [1, 8, 100, 101])
def test_kl_is_tkd_plus_uncertainty_times_dkd(k):
    """The coarse KL over the kept ids and the tail where the label is kept, else the finer one."""
    case = Case.random()
    for label_N in (case.teacher_NV.argmax(-1), case.label_N):
        labelled = replace(case, label_N=label_N)
        parts = losses(labelled, k).reports
        total_N = parts["tkd"] + parts["uncertainty"] * parts["dkd"]
        kl_N = losses(labelled, k).kl_N
        kept_N = (shipped(labelled, k).ids_NK == label_N[:, None]).any(-1)
        torch.testing.assert_close(total_N[kept_N], kl_N[kept_N], atol=1e-9, rtol=0)
        assert (total_N >= kl_N - 1e-9).all()
    assert not kept_N.all() or k >= 100


def test_bucketed_dkd_is_a_lower_bound_that_rises_with_k_to_the_dense_value():
    case = Case.random()
    values = [losses(case, k).reports["dkd"] for k in (1, 4, 16, 64, 101)]
    assert (torch.stack(values).diff(dim=0) > -1e-9).all()
    full_N = dense(case, 101)["dkd"].detach()
    torch.testing.assert_close(values[-1], full_N, atol=1e-9, rtol=0)
    assert values[0].mean() < 0.5 * full_N.mean()


@BOTH
def test_the_order_of_other_ids_changes_nothing(direction):
    case = Case.random()
    order_V = torch.randperm(101, generator=torch.Generator().manual_seed(3))
    weight_VD = case.head.weight_VD.detach()[order_V].requires_grad_()
    shuffled = Case(
        case.hidden_ND,
        replace(case.head, weight_VD=weight_VD),
        case.teacher_NV[:, order_V],
        order_V.argsort()[case.label_N],
    )
    one, other = (losses(each, 8, direction=direction).loss for each in (case, shuffled))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_dkd_is_no_function_of_the_labels_log_probability():
    case = Case.random()
    teacher, student = (z.log_softmax(-1) for z in (case.teacher_NV, case.teacher_NV.flip(0)))
    tail_N = torch.full((37,), -torch.inf, dtype=F64)
    is_label_NK = (
        torch.arange(100)[None] == torch.where(case.label_N < 100, case.label_N, 0)[:, None]
    )
    ids_NM = student[:, :101].clone().requires_grad_()
    own = labelled_student(ids_NM, tail_N, is_label_NK=is_label_NK)
    other = labelled_student(teacher, tail_N, is_label_NK=is_label_NK)
    (gradient_NM,) = torch.autograd.grad(decoupled(other, own).dkd_N.sum(), ids_NM)
    assert torch.equal(gradient_NM[:, -1], torch.zeros(37, dtype=F64))
    assert (gradient_NM[:, :-1][is_label_NK] == 0).all()
    assert gradient_NM.abs().max() > 1e-2


def logits_case(case: Case) -> Case:
    """The student's logits themselves as the hidden states, below a head that is the identity."""
    logits_NV = case.head.logits(case.hidden_ND).detach().requires_grad_()
    identity = torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)
    return Case(logits_NV, replace(case.head, weight_VD=identity), case.teacher_NV, case.label_N)


@BOTH
@pytest.mark.parametrize("k", [1, 8, 101])
def test_an_easy_token_does_not_move_the_labels_logit(direction, k):
    case = logits_case(Case.random())
    found = losses(case, k, direction=direction, columns=classes_of(case, hard=False))
    (gradient_NV,) = gradients(found.loss, case)
    label_N = gradient_NV.gather(1, case.label_N[:, None])
    assert (label_N.abs() < 1e-14 * gradient_NV.abs().max()).all()
    assert gradient_NV.abs().max() > 1e-2
    hard = losses(case, k, direction=direction, columns=classes_of(case, hard=True))
    assert gradients(hard.loss, case)[0].gather(1, case.label_N[:, None]).abs().max() > 1e-2


@BOTH
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(direction):
    case = Case.random()
    case = replace(case, teacher_NV=case.head.logits(case.hidden_ND).detach())
    for k in (1, 8, 101):
        found = losses(case, k, direction=direction)
        assert found.loss.abs() < 1e-9
        assert max(gradient.abs().max() for gradient in gradients(found.loss, case)) < 1e-6


@BOTH
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 12.0, 60.0])
@pytest.mark.parametrize("k", [1, 16, 255, 256])
def test_peaked_tokens_have_finite_values_and_gradients(direction, kind, scale, k):
    case = Case.random(33, vocabulary=256, kind=kind, scale=scale)
    for label_N in (case.label_N, case.teacher_NV.argmax(-1), case.teacher_NV.argmin(-1)):
        labelled = replace(case, label_N=label_N)
        targets = shipped(labelled, k)
        rounded = replace(targets, logprobs_NK=targets.logprobs_NK.half().float())
        found = labelled.losses(
            targets=rounded,
            terms=[atkd_term(direction), forward_kl_term()],
            columns=classes_of(labelled),
            chunk_rows=16,
        )
        everything = [found.loss, *found.reports.values(), *gradients(found.loss, labelled)]
        assert all(value.isfinite().all() for value in everything)


def test_a_token_the_teacher_is_sure_of_has_no_dkd():
    case = Case.random()
    case.teacher_NV[:, 0] = case.teacher_NV.amax(-1) + 20
    sure = replace(case, label_N=torch.zeros_like(case.label_N))
    found = losses(sure, 8)
    assert (found.reports["uncertainty"] < 1e-5).all()
    assert (found.reports["dkd"] == 0).all()
    assert (found.reports["tkd"] > 0).all()


def test_forward_kl_beside_it_is_what_it_is_alone():
    case = Case.random()
    terms = [forward_kl_term(weight=0.4), atkd_term()]
    together = losses(case, 8, terms=terms)
    alone = case.losses(terms=terms[:1], targets=shipped(case, 8))
    torch.testing.assert_close(together.terms["forward_kl"], alone.terms["forward_kl"])
    apart = [losses(case, 8).loss, alone.loss]
    total = [sum(pair) for pair in zip(*(gradients(x, case) for x in apart), strict=True)]
    pairs = zip(gradients(together.loss, case), total, strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)

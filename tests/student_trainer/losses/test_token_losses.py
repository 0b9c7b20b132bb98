"""The trainer's loss against dense float64, its laws, and its limits on memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from student_trainer.losses.auxiliary.auxiliary import with_auxiliaries
from student_trainer.losses.kernel.buckets import Buckets, teacher_distribution
from student_trainer.losses.kernel.primitive import gathered_log_softmax
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.registry import auxiliaries_of, loss_names
from student_trainer.losses.terms.divergences import forward_kl
from student_trainer.losses.token_losses import evaluate_tokens
from tests.student_trainer.losses.dense import (
    ALL_TEMPERATURES,
    MIXES,
    Case,
    bucketed_kl,
    cross_entropy_term,
    dense_loss,
    forward_kl_term,
    full_kl,
    gradients,
    relative_error,
    targets_from,
)

HEADS = [
    {},
    {"bias": True},
    {"soft_cap": 3.0},
    {"logit_scale": 0.3},
    {"bias": True, "logit_scale": 1.7, "soft_cap": 5.0},
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("terms", MIXES)
def test_loss_and_gradients_equal_the_dense_ones(options, terms):
    case, multiplier = Case.random(**options), 1 / 37
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    found = case.losses(terms=terms, targets=targets, multiplier=multiplier, chunk_rows=10)
    expected = multiplier * dense_loss(case, terms, 8)
    torch.testing.assert_close(found.loss, expected, atol=1e-12, rtol=1e-12)
    pairs = zip(gradients(found.loss, case), gradients(expected, case), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)


@pytest.mark.parametrize("encoding", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32_gradients_at_k_64_are_within_1e_5_of_dense_float64(encoding, temperature):
    """The dense reference decodes the same rounded targets, so only the student's error counts."""
    case = Case.random(256, width=64, vocabulary=4_000, kind=torch.float32, scale=3.0)
    temperatures = (1.0, 2.0)
    targets = case.targets(64, temperatures=temperatures)
    targets = replace(targets, logprobs_NK=targets.logprobs_NK.to(encoding).float())
    terms = [forward_kl_term(temperature=temperature)]
    found = gradients(case.losses(terms=terms, targets=targets, chunk_rows=50).loss, case)
    exact, column = case.in_float64(), temperatures.index(temperature)
    teacher = teacher_distribution(
        targets.logprobs_NK.double(),
        targets.log_tail_NS[:, column].double(),
        temperature=temperature,
    )
    log_q_NV = (exact.head.logits(exact.hidden_ND) / temperature).log_softmax(-1)
    tail_N = log_q_NV.scatter(1, targets.ids_NK, -torch.inf).logsumexp(-1)
    student = Buckets(log_q_NV.gather(1, targets.ids_NK), tail_N)
    dense = temperature**2 * forward_kl(teacher, student).sum()
    errors = [relative_error(*pair) for pair in zip(found, gradients(dense, exact), strict=True)]
    assert max(errors) < 1e-5, errors


def test_the_fast_path_equals_the_recomputing_one():
    case = Case.random(bias=True, soft_cap=4.0, logit_scale=0.8)
    targets = case.targets(8)
    fast = case.losses(terms=[forward_kl_term()], targets=targets, chunk_rows=7).loss
    log_q, log_tail = gathered_log_softmax(
        case.hidden_ND,
        case.head,
        ids_NM=targets.ids_NK,
        kept_NM=torch.ones_like(targets.ids_NK, dtype=torch.bool),
        chunk_rows=7,
    )
    teacher = teacher_distribution(targets.logprobs_NK, targets.log_tail_NS[:, 0], temperature=1.0)
    slow = forward_kl(teacher, Buckets(log_q[0], log_tail[0])).sum()
    torch.testing.assert_close(fast, slow, atol=1e-11, rtol=0)
    pairs = zip(gradients(fast, case), gradients(slow, case), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)


def test_the_total_gradient_is_the_weighted_sum_of_the_terms_own():
    case = Case.random(kind=torch.float32)
    targets, terms = case.targets(8, temperatures=ALL_TEMPERATURES), MIXES[-1]
    total = gradients(case.losses(terms=terms, targets=targets).loss, case)
    alone = []
    for term in terms:
        unweighted = SimpleNamespace(**{**vars(term), "weight": 1.0})
        own = gradients(case.losses(terms=[unweighted], targets=targets).loss, case)
        alone.append([term.weight * gradient for gradient in own])
    for found, parts in zip(total, zip(*alone, strict=True), strict=True):
        assert relative_error(found, sum(parts[1:], parts[0])) < 1e-6


def test_values_per_token_are_unweighted_and_diagnostics_are_at_temperature_one():
    case, terms = Case.random(), MIXES[-1]
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    found = case.losses(terms=terms, targets=targets, multiplier=0.01, chunk_rows=9)
    student_NV = case.head.logits(case.hidden_ND).detach()
    nll_N = nn.functional.cross_entropy(student_NV, case.label_N, reduction="none")
    kl_N = bucketed_kl(case.teacher_NV, student_NV, targets.ids_NK)
    mass_N = case.teacher_NV.softmax(-1).gather(1, targets.ids_NK).sum(-1)
    assert list(found.terms) == ["forward_kl", "forward_kl_2", "forward_kl_3", "cross_entropy"]
    for value, expected in [
        (found.label_nll_N, nll_N),
        (found.kl_N, kl_N),
        (found.captured_mass_N, mass_N),
        (found.unseen_mass_N, 1 - student_NV.softmax(-1).gather(1, targets.ids_NK).sum(-1)),
        (found.terms["forward_kl"], kl_N),
        (found.terms["cross_entropy"], nll_N),
    ]:
        torch.testing.assert_close(value, expected, atol=1e-11, rtol=0)
        assert not value.requires_grad
    weighted_N = sum(
        term.weight * found.terms[name] for name, term in zip(loss_names(terms), terms, strict=True)
    )
    torch.testing.assert_close(found.loss, 0.01 * weighted_N.sum(), atol=1e-12, rtol=0)


def test_hard_labels_alone_need_no_teacher():
    case = Case.random()
    found = case.losses(terms=[cross_entropy_term()])
    expected = dense_loss(case, [cross_entropy_term()], 8)
    torch.testing.assert_close(found.loss, expected, atol=1e-11, rtol=0)
    assert found.kl_N is None
    assert found.captured_mass_N is None
    assert found.unseen_mass_N is None
    pairs = zip(gradients(found.loss, case), gradients(expected, case), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)


def test_a_label_inside_and_outside_the_selection_counts_once_in_the_mass():
    case = Case.random()
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    inside, outside = targets.ids_NK[:, 3], case.teacher_NV.argmin(-1)
    terms = MIXES[3]
    for label_N in (inside, outside):
        labelled = replace(case, label_N=label_N)
        found = labelled.losses(terms=terms, targets=targets)
        expected = dense_loss(labelled, terms, 8)
        torch.testing.assert_close(found.loss, expected, atol=1e-11, rtol=0)
        pairs = zip(gradients(found.loss, case), gradients(expected, case), strict=True)
        assert all(relative_error(one, other) < 1e-12 for one, other in pairs)


@pytest.mark.parametrize("k", [1, 8, 101])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(k, temperature):
    for kind, bound in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        case = Case.random(kind=kind)
        logits_NV = case.head.logits(case.hidden_ND).detach().double()
        case = replace(case, teacher_NV=logits_NV)
        targets = case.targets(k, temperatures=(1.0, 2.0))
        found = case.losses(terms=[forward_kl_term(temperature=temperature)], targets=targets)
        assert found.terms["forward_kl"].abs().max() < bound
        hidden_grad, weight_grad = gradients(found.loss, case)
        assert hidden_grad.abs().max() < 10 * bound
        assert weight_grad.abs().max() < 10 * bound


def test_one_kept_id_still_teaches():
    case = Case.random()
    found = case.losses(terms=[forward_kl_term()], targets=case.targets(1))
    assert (found.terms["forward_kl"] > 0).all()
    assert (gradients(found.loss, case)[0].norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0, 50.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("k", [1, 16, 255, 256])
def test_loss_and_gradients_are_finite(kind, scale, temperature, k):
    case = Case.random(33, vocabulary=256, kind=kind, scale=scale)
    temperatures = (1.0,) if temperature == 1 else (1.0, temperature)
    targets = case.targets(k, temperatures=temperatures)
    targets = replace(targets, logprobs_NK=targets.logprobs_NK.half().float())
    terms = [forward_kl_term(temperature=temperature), cross_entropy_term()]
    found = case.losses(terms=terms, targets=targets, chunk_rows=16)
    everything = [found.loss, *found.terms.values(), *gradients(found.loss, case)]
    assert all(value.isfinite().all() for value in everything)


def test_a_larger_teachers_padding_mass_is_left_out_where_the_student_keeps_everything():
    case = Case.random(9, vocabulary=20)
    padded_NV = torch.cat([case.teacher_NV, torch.zeros(9, 4, dtype=torch.float64)], 1)
    exact = targets_from(padded_NV[:, :20], 20)
    log_p_NV = padded_NV.log_softmax(-1)
    shipped = TeacherTargets(
        exact.ids_NK,
        log_p_NV.gather(1, exact.ids_NK),
        log_p_NV[:, 20:].logsumexp(-1)[:, None],
        (1.0,),
    )
    found = case.losses(terms=[forward_kl_term()], targets=shipped)
    expected_N = full_kl(case.teacher_NV, case.head.logits(case.hidden_ND).detach())
    torch.testing.assert_close(found.terms["forward_kl"], expected_N, atol=1e-12, rtol=0)
    assert all(g.isfinite().all() for g in gradients(found.loss, case))


def test_student_rows_beyond_the_shared_vocabulary_belong_to_the_tail():
    case = Case.random(9, vocabulary=20)
    targets = targets_from(case.teacher_NV[:, :16], 16)
    small = replace(targets, log_tail_NS=torch.full((9, 1), -torch.inf, dtype=torch.float64))
    found = case.losses(terms=[forward_kl_term()], targets=small)
    log_q_NV = case.head.logits(case.hidden_ND).log_softmax(-1)
    log_p_NK = targets.logprobs_NK
    dense = (log_p_NK.exp() * (log_p_NK - log_q_NV.gather(1, targets.ids_NK))).sum()
    torch.testing.assert_close(found.loss, dense, atol=1e-12, rtol=0)
    pairs = zip(gradients(found.loss, case), gradients(dense, case), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)


def test_evaluation_gives_full_and_bucketed_kl_without_gradients():
    case = Case.random(vocabulary=64)
    student_NV = case.head.logits(case.hidden_ND).detach()
    expected_nll_N = nn.functional.cross_entropy(student_NV, case.label_N, reduction="none")
    for k in (8, 64):
        targets = case.targets(k)
        nll_N, kl_N = evaluate_tokens(
            case.hidden_ND, case.head, label_N=case.label_N, targets=targets, chunk_rows=10
        )
        expected_N = bucketed_kl(case.teacher_NV, student_NV, targets.ids_NK)
        torch.testing.assert_close(nll_N, expected_nll_N, atol=1e-11, rtol=0)
        torch.testing.assert_close(kl_N, expected_N, atol=1e-11, rtol=0)
        assert not nll_N.requires_grad
    torch.testing.assert_close(kl_N, full_kl(case.teacher_NV, student_NV), atol=1e-11, rtol=0)
    assert evaluate_tokens(case.hidden_ND, case.head, label_N=case.label_N)[1] is None


def test_hidden_states_join_the_weighted_sum():
    case = Case.random(width=6)
    projections = nn.ModuleDict({"2": nn.Linear(6, 5, bias=False, dtype=torch.float64)})
    batch = {"student_1_ND": case.hidden_ND, "teacher_2_NE": torch.randn(37, 5)}
    matching = SimpleNamespace(kind="hidden_states", weight=0.4, layers={2: 1}, distance="mse")
    sections = [matching, cross_entropy_term(weight=0.6)]
    auxiliaries = auxiliaries_of(sections, projections)
    found = with_auxiliaries(
        case.losses(terms=sections, multiplier=0.1), auxiliaries, batch, multiplier=0.1
    )
    teacher_NE = batch["teacher_2_NE"].double()
    value_N = (projections["2"](case.hidden_ND) - teacher_NE).square().mean(-1)
    expected = 0.1 * (0.4 * value_N.sum() + dense_loss(case, sections[1:], 8) * 1.0)
    torch.testing.assert_close(found.loss, expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(found.terms["hidden_states"], value_N.detach())
    assert set(found.terms) == {"hidden_states", "cross_entropy"}
    leaf = projections["2"].weight
    one, other = (torch.autograd.grad(x, [leaf, case.hidden_ND]) for x in (found.loss, expected))
    torch.testing.assert_close(one, other, atol=1e-11, rtol=0)
    alone = with_auxiliaries(case.losses(terms=[matching]), auxiliaries, batch, multiplier=1.0)
    assert torch.equal(gradients(alone.loss, case)[1], torch.zeros_like(case.head.weight_VD))


@pytest.mark.parametrize("chunk_rows", [5, None])
def test_hard_labels_never_see_tokens_that_the_student_wrote(chunk_rows: int | None) -> None:
    """Value and gradient are those of the text's own positions; a divergence learns from all."""
    case = Case.random()
    written_N = torch.arange(len(case.label_N)) % 3 == 1
    terms = [cross_entropy_term(weight=0.3), forward_kl_term()]
    targets = case.targets(5)
    found = case.losses(
        terms=terms, targets=targets, columns={"written_N": written_N}, chunk_rows=chunk_rows
    )
    nll_N = nn.functional.cross_entropy(
        case.head.logits(case.hidden_ND), case.label_N, reduction="none"
    )
    kl_N = bucketed_kl(
        case.teacher_NV, case.head.logits(case.hidden_ND), case.teacher_NV.topk(5).indices
    )
    text_N = torch.where(written_N, 0.0, nll_N)
    torch.testing.assert_close(found.terms["cross_entropy"], text_N.detach())
    torch.testing.assert_close(found.terms["forward_kl"], kl_N.detach())
    torch.testing.assert_close(found.label_nll_N, nll_N.detach())
    leaves = [leaf for leaf in case.leaves if leaf is not None]
    expected = torch.autograd.grad((0.3 * text_N + kl_N).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(found.loss, leaves), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-10

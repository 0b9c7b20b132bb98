"""Losses on drawn ids: the dense ones where nothing is left out, and in expectation elsewhere.

N positions   D hidden width   V vocabulary   K ids kept per position
"""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from shared.config.losses import Divergence, Loss
from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.primitive import Head, gathered_log_softmax
from student_trainer.losses.registry import terms_of
from student_trainer.losses.terms.divergences import DIVERGENCES
from student_trainer.losses.token_losses import TokenLosses, evaluate_tokens, token_losses
from tests.drawn import drawn_answer, drawn_spec, drawn_targets, draws_of, row_of
from tests.student_trainer.losses.dense import Case, cross_entropy_term, full_kl

SELECTORS = ("threshold", "sampled")
KINDS = ("forward_kl", "soft_cross_entropy")


def term(kind: str, *, temperature: float = 1.0, weight: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(
        kind=kind, weight=weight, temperature=temperature, times_temperature_squared=True
    )


def learnt(case: Case, targets: DrawnTargets, terms: list, **more) -> tuple[TokenLosses, Tensor]:
    """The losses, and the gradient of the head's weight [V, D]."""
    weight_VD = case.head.weight_VD.detach().requires_grad_()
    head = Head(weight_VD, case.head.bias_V, case.head.logit_scale, case.head.soft_cap)
    found = token_losses(
        case.hidden_ND, head, label_N=case.label_N, terms=terms_of(terms), targets=targets, **more
    )
    found.loss.backward()
    assert weight_VD.grad is not None
    return found, weight_VD.grad


def dense(case: Case, kind: str, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence over the whole vocabulary [N], times T^2, and its head gradient [V, D]."""
    weight_VD = case.head.weight_VD.detach().requires_grad_()
    head = Head(weight_VD, case.head.bias_V, case.head.logit_scale, case.head.soft_cap)
    p_NV = (case.teacher_NV / temperature).softmax(-1)
    log_q_NV = (head.logits(case.hidden_ND) / temperature).log_softmax(-1)
    value_N = -(p_NV * log_q_NV).sum(-1)
    if kind == "forward_kl":
        value_N = value_N - torch.special.entr(p_NV).sum(-1)
    value_N = value_N * temperature**2
    (grad_VD,) = torch.autograd.grad(value_N.sum(), weight_VD)
    return value_N.detach(), grad_VD


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", [{}, {"bias": True, "logit_scale": 1.7, "soft_cap": 5.0}])
def test_everything_kept_is_the_dense_loss(kind: str, temperature: float, head: dict) -> None:
    case = Case.random(vocabulary=41, **head)
    spec = drawn_spec("threshold", 41, 41, temperature=temperature)
    targets = drawn_targets(drawn_answer(case.teacher_NV.float(), spec))
    found, grad_VD = learnt(case, targets, [term(kind, temperature=temperature)])
    value_N, dense_VD = dense(case, kind, temperature)
    torch.testing.assert_close(found.terms[kind], value_N, rtol=1e-5, atol=1e-5)
    assert relative(grad_VD, dense_VD) < 1e-5
    torch.testing.assert_close(found.captured_mass_N, torch.ones(37), rtol=0, atol=1e-6)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.drill), 2.0])
def test_value_and_gradient_are_unbiased(selector, temperature: float) -> None:
    case = Case.random(rows=12, vocabulary=60)
    spec = drawn_spec(selector, 8, 60, temperature=temperature)
    for kind in KINDS:
        value_N, dense_VD = dense(case, kind, temperature)
        values, gradients = [], []
        for answer in draws_of(case.teacher_NV.float(), spec, count=150):
            found, grad_VD = learnt(
                case, drawn_targets(answer), [term(kind, temperature=temperature)]
            )
            values.append(found.terms[kind])
            gradients.append(grad_VD)
        for drawn, expected in ((values, value_N), (gradients, dense_VD)):
            drawn = torch.stack(drawn)
            error = drawn.std(0) / len(drawn) ** 0.5
            off = (drawn.mean(0) - expected).abs() / (error + 1e-6)
            assert float(off.max()) < 4.5
            assert float((off**2).mean()) < 1 + 4 * (2 / len(case.hidden_ND)) ** 0.5


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_student_that_is_the_teacher_stays_in_expectation(selector) -> None:
    """The mean gradient over draws is within 4 standard errors of zero, and so is the mean KL."""
    case = Case.random(rows=12, vocabulary=60)
    teacher_NV = case.head.logits(case.hidden_ND).float()
    gradients, values = [], []
    for answer in draws_of(teacher_NV, drawn_spec(selector, 8, 60), count=200):
        found, grad_VD = learnt(case, drawn_targets(answer), [term("forward_kl")])
        gradients.append(grad_VD)
        values.append(found.terms["forward_kl"])
    for drawn in (torch.stack(gradients), torch.stack(values)):
        error = drawn.std(0) / len(drawn) ** 0.5
        assert float((drawn.mean(0).abs() / (error + 1e-6)).max()) < 4
    norm = torch.stack(gradients).mean(0).norm() / torch.stack(gradients).norm(dim=(1, 2)).mean()
    assert norm < 0.15, "draws cancel"


def test_the_fused_form_is_the_primitive() -> None:
    case = Case.random(vocabulary=60)
    targets = drawn_targets(drawn_answer(case.teacher_NV.float(), drawn_spec("sampled", 16, 60)))
    everything = slice(0, len(case.hidden_ND))
    log_q, _ = gathered_log_softmax(
        case.hidden_ND, case.head, ids_NM=targets.ids_NK, kept_NM=targets.kept(everything)
    )
    expected_N = -(targets.log_weights_NK.exp() * log_q[0]).sum(-1)
    found, _ = learnt(case, targets, [term("soft_cross_entropy")])
    torch.testing.assert_close(found.terms["soft_cross_entropy"], expected_N)


def test_labels_and_chunks_ride_along_and_diagnostics_mean_something() -> None:
    case = Case.random(vocabulary=60)
    answer = drawn_answer(case.teacher_NV.float(), drawn_spec("threshold", 8, 60, temperature=2.0))
    targets = drawn_targets(answer)
    terms = [term("forward_kl", temperature=2.0), cross_entropy_term(weight=0.3)]
    one, one_VD = learnt(case, targets, terms)
    _, many_VD = learnt(case, targets, terms, chunk_rows=5)
    torch.testing.assert_close(one_VD, many_VD)
    log_q_NV = case.head.logits(case.hidden_ND).log_softmax(-1)
    nll_N = -log_q_NV.gather(1, case.label_N[:, None])[:, 0]
    torch.testing.assert_close(one.terms["cross_entropy"], nll_N)
    assert one.kl_N is not None
    torch.testing.assert_close(one.kl_N * 4, one.terms["forward_kl"])
    at_two_NV = (case.head.logits(case.hidden_ND) / 2).log_softmax(-1)
    unseen_N = at_two_NV.exp().scatter(1, targets.ids_NK, 0).sum(-1)
    torch.testing.assert_close(one.unseen_mass_N, unseen_N)
    assert one.captured_mass_N is not None
    assert 0 <= float(one.captured_mass_N.min()) < 0.2 < float(one.captured_mass_N.max()) < 1


def test_the_mean_kl_over_positions_is_that_over_the_whole_vocabulary() -> None:
    case = Case.random(rows=400, vocabulary=60)
    targets = drawn_targets(drawn_answer(case.teacher_NV.float(), drawn_spec("threshold", 24, 60)))
    _, kl_N = evaluate_tokens(case.hidden_ND, case.head, label_N=case.label_N, targets=targets)
    exact_N = full_kl(case.teacher_NV, case.head.logits(case.hidden_ND)).detach()
    assert kl_N is not None
    off_N = kl_N - exact_N
    assert abs(float(off_N.mean())) < 4 * float(off_N.std()) / 20
    assert float(kl_N.mean()) == pytest.approx(float(exact_N.mean()), rel=0.05)


def test_the_config_and_the_registry_agree_on_what_takes_drawn_ids() -> None:
    sections = get_args(get_args(Loss)[0])
    by_kind = {s.model_fields["kind"].default: s for s in sections if issubclass(s, Divergence)}
    assert set(by_kind) == set(DIVERGENCES)
    for kind, divergence in DIVERGENCES.items():
        assert by_kind[kind].takes_drawn_ids == (divergence.drawn is not None)


def test_no_position_has_no_loss() -> None:
    case = Case.random(rows=1, vocabulary=20)
    one = drawn_targets(
        drawn_answer(torch.zeros(1, 20), drawn_spec("threshold", 4, 20), rows=row_of(1))
    )
    none = DrawnTargets(
        one.ids_NK[:0], one.log_weights_NK[:0], one.log_tail_N[:0], one.entropy_N[:0], 1.0
    )
    empty = Case(case.hidden_ND[:0], case.head, case.teacher_NV[:0], case.label_N[:0])
    found, grad_VD = learnt(empty, none, [term("forward_kl")])
    assert found.loss == 0
    assert not grad_VD.any()

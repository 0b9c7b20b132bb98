"""Every divergence through `token_losses`: against the textbook in float64, heads, temperatures.

N positions   V vocabulary   K ids kept per position   M outcomes
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import kl_div, rel_entr
from torch import Tensor

from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import TeacherTargets
from tests.student_trainer.losses.dense import Case, gradients, relative_error, tail_of
from tests.student_trainer.losses.textbook import CASES, teacher_share, term, textbook
from tests.telling import telling

F64 = torch.float64
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"soft_cap": 3.0},
    "logit scale": {"logit_scale": 0.3},
    "all": {"bias": True, "logit_scale": 1.7, "soft_cap": 5.0},
}
TEMPERATURES = (1.0, 0.5, 2.0, 4.0)
every_case = pytest.mark.parametrize("name", CASES)


def outcomes(logits_NV: Tensor, ids_NK: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Probabilities of the kept ids and, where anything lies outside them, of the tail [N,M]."""
    log_p_NV = (logits_NV / temperature).log_softmax(-1)
    kept_NK = log_p_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == logits_NV.shape[1]:
        return kept_NK.exp()
    return torch.cat([kept_NK, tail_of(log_p_NV, ids_NK)[:, None]], 1).exp()


def expected(case: Case, name: str, k: int, *, temperature: float = 1.0) -> Tensor:
    """The textbook's values [N], differentiable in the case's leaves."""
    student_NV = case.head.logits(case.hidden_ND)
    ids_NK = case.teacher_NV.topk(k).indices
    pair = [outcomes(x, ids_NK, temperature=temperature) for x in (case.teacher_NV, student_NV)]
    return textbook(name, *pair, tail=k < case.head.vocabulary)


def found(case: Case, name: str, targets: TeacherTargets, **options) -> tuple[Tensor, Tensor]:
    """Loss and values of a case's term alone."""
    losses = case.losses(
        terms=[term(name, **options)],
        targets=targets,
        teacher_share=teacher_share(name),
        chunk_rows=10,
    )
    (value_N,) = losses.terms.values()
    return losses.loss, value_N


@every_case
@pytest.mark.parametrize("k", [1, 8, 100, 101])
def test_values_and_gradients_equal_the_textbook_in_float64(name, k):
    case = Case.random()
    loss, value_N = found(case, name, case.targets(k))
    exact_N = expected(case, name, k)
    torch.testing.assert_close(value_N, exact_N.detach(), atol=1e-11, rtol=1e-11)
    slopes = zip(gradients(loss, case), gradients(exact_N.sum(), case), strict=True)
    for one, other in slopes:
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


@every_case
def test_values_equal_numpy(name):
    case = Case.random(vocabulary=40)
    student_NV = case.head.logits(case.hidden_ND).detach()
    for k in (3, 40):
        _, value_N = found(case, name, case.targets(k))
        ids_NK = case.teacher_NV.topk(k).indices
        p_NM, q_NM = (outcomes(x, ids_NK).numpy() for x in (case.teacher_NV, student_NV))
        exact_N = textbook(name, p_NM, q_NM, tail=k < 40)
        np.testing.assert_allclose(value_N.numpy(), exact_N, atol=1e-12, rtol=1e-10)


def test_values_equal_scipy():
    case = Case.random(vocabulary=40)
    p_NV = case.teacher_NV.softmax(-1).numpy()
    q_NV = case.head.logits(case.hidden_ND).detach().softmax(-1).numpy()
    exact = {
        "forward_kl": rel_entr(p_NV, q_NV).sum(-1),
        "reverse_kl": rel_entr(q_NV, p_NV).sum(-1),
        "generalised_kl forward": kl_div(p_NV, q_NV).sum(-1),
        "generalised_kl reverse": kl_div(q_NV, p_NV).sum(-1),
        "jsd .5": jensenshannon(p_NV, q_NV, axis=-1) ** 2,
        "total_variation": abs(p_NV - q_NV).sum(-1) / 2,
    }
    for name, exact_N in exact.items():
        _, value_N = found(case, name, case.targets(40))
        np.testing.assert_allclose(value_N.numpy(), exact_N, atol=1e-12, rtol=1e-10)


@every_case
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("squared", [True, False])
def test_temperature_and_its_square_are_exact(name, temperature, squared):
    case = Case.random(16, bias=True)
    targets = case.targets(8, temperatures=TEMPERATURES)
    options = {"temperature": temperature, "times_temperature_squared": squared, "weight": 0.7}
    loss, value_N = found(case, name, targets, **options)
    exact_N = expected(case, name, 8, temperature=temperature)
    exact_N = exact_N * temperature**2 if squared else exact_N
    torch.testing.assert_close(value_N, exact_N.detach(), atol=1e-11, rtol=1e-11)
    slopes = zip(gradients(loss, case), gradients(0.7 * exact_N.sum(), case), strict=True)
    for one, other in slopes:
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@every_case
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_every_head_learns_what_the_textbook_says(name, options):
    case = Case.random(16, **options)
    loss, _ = found(case, name, case.targets(8))
    exact = expected(case, name, 8).sum()
    for one, other in zip(gradients(loss, case), gradients(exact, case), strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


@every_case
def test_a_frozen_head_changes_no_other_gradient(name):
    case = Case.random(16, kind=torch.float32)
    trained = gradients(found(case, name, case.targets(8))[0], case)[0]
    frozen = replace(case, head=Head(case.head.weight_VD.detach()))
    (alone,) = gradients(found(frozen, name, case.targets(8))[0], frozen)
    assert torch.equal(alone, trained)


@every_case
def test_a_tied_head_collects_the_gradients_of_both_uses(name):
    case, inputs_N = Case.random(), torch.arange(37)
    weight_VD = case.head.weight_VD

    def tied() -> Case:
        return replace(case, hidden_ND=torch.tanh(weight_VD[inputs_N]), head=Head(weight_VD))

    (one,) = torch.autograd.grad(found(tied(), name, case.targets(8))[0], weight_VD)
    (other,) = torch.autograd.grad(expected(tied(), name, 8).sum(), weight_VD)
    torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


@every_case
def test_float32_gradients_are_within_1e_5_of_the_textbook(name):
    case = Case.random(64, width=32, vocabulary=1_000, kind=torch.float32)
    exact = case.in_float64()
    loss, _ = found(case, name, case.targets(64))
    pair = (gradients(loss, case), gradients(expected(exact, name, 64).sum(), exact))
    if name == "taid 0":  # no gradient but rounding
        assert max(x.abs().max() for x in pair[0]) < 1e-5
    else:
        assert max(relative_error(*x) for x in zip(*pair, strict=True)) < 1e-5


@every_case
@pytest.mark.parametrize("kind", telling([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_loss_and_gradients_are_finite_and_so_are_those_of_no_positions(name, kind):
    """Logits times 1 to 50, temperatures .05 to 8, one id to all, fp16 log-probabilities; the
    fixtures with 4096 ids of which 128 are kept, at which other implementations give NaN."""
    for vocabulary, ks, scales in (
        (64, (1, 16, 63, 64), (1.0, 50.0)),
        (4096, (128,), (1.0, 4.0, 12.0)),
    ):
        for scale in scales:
            case = Case.random(9, vocabulary=vocabulary, kind=kind, scale=scale)
            for k in ks:
                for temperature in (0.05, 1.0, 8.0):
                    temperatures = (1.0,) if temperature == 1 else (1.0, temperature)
                    targets = case.targets(k, temperatures=temperatures)
                    rounded_NK = targets.logprobs_NK.half().float()
                    targets = replace(targets, logprobs_NK=rounded_NK)
                    loss, value_N = found(case, name, targets, temperature=temperature)
                    everything = [loss, value_N, *gradients(loss, case)]
                    assert all(x.isfinite().all() for x in everything), (scale, k, temperature)
    nothing = Case.random(0, kind=kind)
    loss, _ = found(nothing, name, nothing.targets(8))
    assert loss.item() == 0
    assert all((x == 0).all() for x in gradients(loss, nothing))


@every_case
def test_a_teacher_without_mass_where_the_student_has_some_keeps_it_finite(name):
    """The student has rows beyond the shared vocabulary, all of which the teacher shipped."""
    case = Case.random(9, vocabulary=20, kind=torch.float32)
    shared = replace(case, teacher_NV=case.teacher_NV[:, :16]).targets(16)
    targets = replace(shared, log_tail_NS=torch.full((9, 1), -torch.inf))
    loss, value_N = found(case, name, targets)
    assert all(x.isfinite().all() for x in [value_N, *gradients(loss, case)])
    if term(name).kind not in ("generalised_kl", "taid"):
        bias = replace(case, head=replace(case.head, bias_V=torch.zeros(20).requires_grad_()))
        slope_V = gradients(found(bias, name, targets)[0], bias)[-1]
        assert slope_V[16:].sum() > 0  # these rows are unlearnt


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("taid")])
def test_taids_gradient_is_its_share_of_forward_kls(name):
    case = Case.random(16)
    pair = [found(case, kind, case.targets(8))[0] for kind in (name, "forward_kl")]
    for one, other in zip(*(gradients(loss, case) for loss in pair), strict=True):
        torch.testing.assert_close(one, teacher_share(name) * other, atol=1e-11, rtol=1e-9)


def test_a_reverse_kl_does_not_reward_mass_outside_the_kept_ids():
    """A student whose mass moves from a kept id into the tail is further from the teacher."""
    teacher_NV = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=F64).log()
    head = Head(torch.eye(4, dtype=F64))
    for name in ("reverse_kl", "generalised_kl reverse", "jsd .5", "skew_reverse_kl .1"):
        values = []
        for q_V in ([0.6, 0.3, 0.05, 0.05], [0.4, 0.2, 0.2, 0.2]):
            logits_NV = torch.tensor([q_V], dtype=F64).log()
            case = Case(logits_NV, head, teacher_NV, torch.tensor([0]))
            values.append(found(case, name, case.targets(2))[1].item())
        assert values[0] < 1e-12
        assert values[1] > 1e-3

"""Divergences on buckets: golden values, and the teacher's distribution at a temperature."""

import pytest
import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, log1mexp, teacher_distribution
from student_trainer.losses.terms.divergences import DIVERGENCES, forward_kl, soft_cross_entropy
from tests.student_trainer.losses.dense import bucketed_kl, full_kl, tail_of, targets_from

F64 = torch.float64


def buckets(probabilities: list[float], k: int) -> Buckets:
    p = torch.tensor([probabilities], dtype=F64)
    return Buckets(p[:, :k].log(), p[:, k:].sum(-1).log())


def student_kl(p: list[float], logits_V: Tensor, k: int) -> Tensor:
    log_q_1V = logits_V.log_softmax(-1)[None]
    ids_1K = torch.arange(k)[None]
    student = Buckets(log_q_1V[:, :k], tail_of(log_q_1V, ids_1K))
    return forward_kl(buckets(p, k), student).sum()


@pytest.mark.parametrize(
    ("p", "q", "k", "nats"),
    [
        ([0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.3, 0.2, 0.1, 0.1], 2, 0.088015169),
        ([0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.3, 0.2, 0.1, 0.1], 5, 0.096510120),
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], 1, 0.0822829),
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], 2, 0.0851228),
        ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2], 3, 0.0851228),
    ],
)
def test_forward_kl_has_the_published_values(p, q, k, nats):
    found = forward_kl(buckets(p, k), buckets(q, k)).item()
    assert found == pytest.approx(nats, abs=5e-8)


# Teacher and student of the two published fixtures.
FIVE = ([0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.3, 0.2, 0.1, 0.1])
THREE = ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("kind", "parameters", "pair", "k", "nats"),
    [
        ("reverse_kl", {}, FIVE, 5, 0.095242978),
        ("reverse_kl", {}, FIVE, 2, 0.083464674),
        ("jsd", {"beta": 0.1}, FIVE, 5, 0.008639971),
        ("jsd", {"beta": 0.5}, FIVE, 5, 0.023706770),
        ("jsd", {"beta": 0.9}, FIVE, 5, 0.008548438),
        ("jsd", {"beta": 0.0}, FIVE, 5, 0.096510120),
        ("jsd", {"beta": 1.0}, FIVE, 5, 0.095242978),
        ("skew_forward_kl", {"alpha": 0.1}, FIVE, 5, 0.077383506),
        ("skew_forward_kl", {"alpha": 0.5}, FIVE, 5, 0.023547208),
        ("skew_reverse_kl", {"alpha": 0.1}, FIVE, 5, 0.076763544),
        ("skew_reverse_kl", {"alpha": 0.5}, FIVE, 5, 0.023866331),
        ("total_variation", {}, FIVE, 5, 0.2),
        ("akl", {"mu": 0.5}, FIVE, 5, 0.095876549),
        ("akl", {"mu": 1.0}, FIVE, 5, 0.096510120),
        ("alpha_beta", {"alpha": 1.0, "beta": 1.0}, FIVE, 5, 0.0275),  # half the squared distance
        ("reverse_kl", {}, THREE, 3, 0.0920329),
        ("reverse_kl", {}, THREE, 1, 0.0871767),
        ("jsd", {"beta": 0.5}, THREE, 3, 0.0219012),
        ("jsd", {"beta": 0.1}, THREE, 3, 0.0076947),
        ("jsd", {"beta": 0.9}, THREE, 3, 0.0081848),
        ("total_variation", {}, THREE, 3, 0.2),
        ("skew_forward_kl", {"alpha": 0.1}, THREE, 3, 0.0695780),
        ("skew_reverse_kl", {"alpha": 0.1}, THREE, 3, 0.0728275),
        ("generalised_kl", {"direction": "forward"}, THREE, 1, 0.0355306),
        ("generalised_kl", {"direction": "reverse"}, THREE, 1, 0.0317639),
        ("generalised_kl", {"direction": "forward"}, THREE, 2, 0.0544375),
        ("generalised_kl", {"direction": "reverse"}, THREE, 2, 0.0534034),
    ],
)
def test_divergences_have_the_published_values(kind, parameters, pair, k, nats):
    if kind == "jsd":
        parameters = {"continuous": False, **parameters}
    found = DIVERGENCES[kind].function(*(buckets(x, k) for x in pair), **parameters)
    assert found.item() == pytest.approx(nats, abs=5e-8 if pair is THREE else 1e-9)


@pytest.mark.parametrize(
    ("alpha", "beta", "limit"), [(1.0, 1e-5, "forward_kl"), (1e-5, 1.0, "reverse_kl")]
)
def test_alpha_beta_tends_to_both_kls(alpha, beta, limit):
    teacher, student = (buckets(x, 5) for x in FIVE)
    found = DIVERGENCES["alpha_beta"].function(teacher, student, alpha=alpha, beta=beta)
    expected = DIVERGENCES[limit].function(teacher, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_taids_target_is_the_published_arithmetic_mixture():
    teacher, student = (buckets(x, 5) for x in FIVE)
    found = DIVERGENCES["taid"].function(teacher, student, teacher_share=0.4)
    target = 0.4 * torch.tensor(FIVE[0], dtype=F64) + 0.6 * torch.tensor(FIVE[1], dtype=F64)
    entropy = torch.special.entr(target).sum()
    assert (found - entropy).item() == pytest.approx(0.015805139, abs=1e-9)


def test_akl_weighs_the_head_of_a_certain_teacher_by_its_gap():
    """One id holds all teacher mass: the head is that id, and half of the gap is its own."""
    teacher = Buckets(torch.tensor([[0.0, -torch.inf]], dtype=F64), torch.tensor([-torch.inf]))
    student = Buckets(torch.tensor([[0.6, 0.4]], dtype=F64).log(), torch.tensor([-torch.inf]))
    found, forward, reverse = (
        DIVERGENCES[kind].function(teacher, student, **parameters).item()
        for kind, parameters in (("akl", {"mu": 0.5}), ("forward_kl", {}), ("reverse_kl", {}))
    )
    assert found == pytest.approx((forward + reverse) / 2)


def test_akl_finds_the_head_whatever_the_order_of_the_ids():
    shuffled = [[x[i] for i in (4, 2, 0, 3, 1)] for x in FIVE]
    pairs = [[buckets(x, 5) for x in pair] for pair in (FIVE, shuffled)]
    for mu in (0.5, 0.75, 0.9):
        one, other = (DIVERGENCES["akl"].function(*pair, mu=mu).item() for pair in pairs)
        assert one == pytest.approx(other, abs=1e-12)


def test_forward_kl_at_temperature_two_has_the_published_value():
    logits_1V = torch.tensor([[0.7, 0.2, 0.1]], dtype=F64).log()
    student_1V = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).log()
    found = bucketed_kl(logits_1V, student_1V, torch.arange(3)[None], temperature=2.0).item()
    tail_1 = torch.full((1,), -torch.inf, dtype=F64)
    teacher = teacher_distribution(logits_1V, tail_1, temperature=2.0)
    student = Buckets((student_1V / 2).log_softmax(-1), tail_1)
    assert forward_kl(teacher, student).item() == pytest.approx(0.0245743, abs=5e-8)
    assert found == pytest.approx(0.0245743, abs=5e-8)


def test_the_gradient_is_the_published_one_on_and_off_the_kept_ids():
    p = [0.5, 0.2, 0.15, 0.1, 0.05]
    logits_V = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=F64).log().requires_grad_()
    student_kl(p, logits_V, 2).backward()
    expected = torch.tensor([-0.2, 0.1, 0.05, 0.025, 0.025], dtype=F64)
    torch.testing.assert_close(logits_V.grad, expected, atol=1e-12, rtol=0)


def test_bucketed_kl_rises_with_k_and_meets_the_full_kl():
    torch.manual_seed(0)
    teacher_NV, student_NV = (2 * torch.randn(32, 200, dtype=F64) for _ in range(2))
    order = teacher_NV.argsort(-1, descending=True)
    values = []
    for k in (1, 2, 8, 64, 199, 200):
        log_q_NV, ids_NK = student_NV.log_softmax(-1), order[:, :k]
        targets = targets_from(teacher_NV, k)
        teacher = teacher_distribution(
            targets.logprobs_NK, targets.log_tail_NS[:, 0], temperature=1.0
        )
        student = Buckets(log_q_NV.gather(1, ids_NK), tail_of(log_q_NV, ids_NK))
        values.append(forward_kl(teacher, student))
    steps_N = torch.stack(values).diff(dim=0)
    assert (steps_N > -1e-12).all()
    torch.testing.assert_close(values[-1], full_kl(teacher_NV, student_NV), atol=1e-12, rtol=0)
    torch.testing.assert_close(values[-2], values[-1], atol=1e-12, rtol=0)
    assert values[0].mean() < 0.5 * values[-1].mean()


def test_an_outcome_without_teacher_mass_adds_nothing_and_has_no_gradient():
    log_q_NK = torch.tensor([[0.5, 0.5]], dtype=F64).log().requires_grad_()
    tail_N = torch.tensor([-torch.inf], dtype=F64).requires_grad_()
    teacher = Buckets(torch.tensor([[0.0, -torch.inf]], dtype=F64), torch.tensor([-torch.inf]))
    value = forward_kl(teacher, Buckets(log_q_NK, tail_N)).sum()
    value.backward()
    assert value.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert torch.equal(log_q_NK.grad, torch.tensor([[-1.0, 0.0]], dtype=F64))
    assert torch.equal(tail_N.grad, torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 8.0])
def test_rounded_teacher_buckets_sum_to_one_and_keep_the_shipped_tail(temperature):
    torch.manual_seed(1)
    targets = targets_from(3 * torch.randn(64, 500, dtype=F64), 16, temperatures=(1.0, temperature))
    rounded_NK = targets.logprobs_NK.half().double()
    found = teacher_distribution(rounded_NK, targets.log_tail_NS[:, 1], temperature=temperature)
    total_N = found.kept_NK.exp().sum(-1) + found.tail_N.exp()
    torch.testing.assert_close(total_N, torch.ones(64, dtype=F64), atol=1e-12, rtol=0)
    assert torch.equal(found.tail_N, targets.log_tail_NS[:, 1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_exact_log_probabilities_give_the_teacher_at_any_temperature(temperature):
    torch.manual_seed(2)
    logits_NV = 3 * torch.randn(16, 300, dtype=F64)
    targets = targets_from(logits_NV, 8, temperatures=(temperature,))
    found = teacher_distribution(
        targets.logprobs_NK, targets.log_tail_NS[:, 0], temperature=temperature
    )
    expected_NK = (logits_NV / temperature).log_softmax(-1).gather(1, targets.ids_NK)
    torch.testing.assert_close(found.kept_NK, expected_NK, atol=1e-10, rtol=0)


def test_log1mexp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -5.0, -20.0, -60.0, -torch.inf])
    expected = torch.log(-torch.expm1(x.double()))
    torch.testing.assert_close(log1mexp(x).double(), expected, atol=1e-12, rtol=3e-7)


@pytest.mark.parametrize("k", [1, 8, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_cross_entropy_is_forward_kl_plus_the_teachers_entropy(k, temperature):
    torch.manual_seed(3)
    targets = targets_from(2 * torch.randn(16, 50, dtype=F64), k, temperatures=(temperature,))
    teacher = teacher_distribution(
        targets.logprobs_NK, targets.log_tail_NS[:, 0], temperature=temperature
    )
    logits_NV = torch.randn(16, 50, dtype=F64).requires_grad_()
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    student = Buckets(log_q_NV.gather(1, targets.ids_NK), tail_of(log_q_NV, targets.ids_NK))
    found_N, kl_N = soft_cross_entropy(teacher, student), forward_kl(teacher, student)
    outcomes = torch.cat([teacher.kept_NK, teacher.tail_N[:, None]], 1).exp()
    entropy_N = torch.special.entr(outcomes).sum(-1)
    torch.testing.assert_close(found_N - entropy_N, kl_N, atol=1e-12, rtol=0)
    pair = [torch.autograd.grad(x.sum(), logits_NV, retain_graph=True)[0] for x in (found_N, kl_N)]
    torch.testing.assert_close(*pair, atol=1e-12, rtol=0)

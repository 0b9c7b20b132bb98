"""Every law that a divergence declares, over Zipf-like teachers of all sizes and sharpnesses.

Log-probabilities stand in the teacher's order, likeliest id first, so that the first k are what a
teacher ships.

N positions   V vocabulary   K ids kept per position
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.terms.divergences import DIVERGENCES, Divergence
from tests.student_trainer.losses.textbook import CASES, parameters
from tests.telling import telling

TEMPERATURES = (0.05, 0.3, 1.0, 2.0, 8.0)
SCALES = (1.0, 4.0, 12.0, 50.0)
SIZES = (3, 5, 17, 257)
WIDE, LARGE = 4096, 200_000  # not in float64
# Logits of that type; float32 and wider compute in their own, bfloat16 in float32.
KINDS = (torch.float64, torch.float32, torch.bfloat16)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}

every_case = pytest.mark.parametrize("name", CASES)
every_kind = pytest.mark.parametrize("kind", telling(KINDS, torch.float64, torch.bfloat16), ids=str)


@cache
def logits(
    vocabulary: int, kind: torch.dtype, temperatures: tuple[float, ...] = TEMPERATURES
) -> tuple[Tensor, Tensor]:
    """Teacher and student [N,V] at every scale and temperature: a Zipf law with noise against
    itself with more noise, against another one, and against a nearly flat student."""
    generator = torch.Generator().manual_seed(vocabulary)
    copies = 1 if vocabulary >= WIDE else 3
    sharpness = [scale / t for scale in SCALES for t in temperatures]
    if vocabulary == LARGE and len(sharpness) > 6:
        sharpness = sharpness[::3]
    shape = (copies * len(sharpness), vocabulary)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ranks_V = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    zipf_V = -ranks_V.log()
    zipf_V = (zipf_V - zipf_V.mean()) / zipf_V.std()
    teacher_NV = zipf_V + 0.3 * normal()
    other_NV = zipf_V[torch.randperm(vocabulary, generator=generator)] + 0.3 * normal()
    pattern_N1 = torch.arange(shape[0])[:, None] % 3
    close_NV = teacher_NV + 0.05 * normal()
    student_NV = torch.where(pattern_N1 == 0, close_NV, other_NV)
    student_NV = torch.where(pattern_N1 == 2, 0.01 * other_NV, student_NV)
    factor_N1 = torch.tensor(sharpness, dtype=torch.float64).repeat_interleave(copies)[:, None]
    order_NV = teacher_NV.argsort(-1, descending=True)
    wide = torch.promote_types(kind, torch.float32)
    pair = [(x * factor_N1).gather(1, order_NV).to(kind).to(wide) for x in (teacher_NV, student_NV)]
    return pair[0], pair[1]


def buckets(logits_NV: Tensor, k: int) -> Buckets:
    """The first k ids and the rest; differentiable."""
    log_p_NV = logits_NV.log_softmax(-1)
    if k == logits_NV.shape[1]:
        return Buckets(log_p_NV, torch.full_like(log_p_NV[:, 0], -torch.inf))
    return Buckets(log_p_NV[:, :k], log_p_NV[:, k:].logsumexp(-1))


@cache
def pairs(vocabulary: int, kind: torch.dtype) -> list[tuple[Buckets, Buckets]]:
    """Teacher and student at growing k, the last one V."""
    teacher_NV, student_NV = logits(vocabulary, kind)
    return [(buckets(teacher_NV, k), buckets(student_NV, k)) for k in widths(vocabulary)]


def widths(vocabulary: int) -> list[int]:
    """1, 2, about the root, half, all but one and all; fewer for the largest."""
    if vocabulary == LARGE:
        return [1, 64, vocabulary]
    return sorted({1, 2, math.isqrt(vocabulary), vocabulary // 2, vocabulary - 1, vocabulary})


@cache
def values(name: str, vocabulary: int, kind: torch.dtype) -> Tensor:
    """A case at every width [widths, N]."""
    return torch.stack([value(name, *pair) for pair in pairs(vocabulary, kind)])


def value(name: str, teacher: Buckets, student: Buckets) -> Tensor:
    return entry(name).function(teacher, student, **parameters(name))


def entry(name: str) -> Divergence:
    return DIVERGENCES[CASES[name]["kind"]]


def sizes(kind: torch.dtype) -> tuple[int, ...]:
    """Vocabularies for a type."""
    return SIZES if kind == torch.float64 else (*SIZES, WIDE, LARGE)


def slack(found: Tensor) -> Tensor:
    """What rounding may move: a share of the larger of the value and one nat."""
    return ROUNDING[found.dtype] * found.abs().clamp(min=1)


def test_every_divergence_is_tested():
    assert {case["kind"] for case in CASES.values()} == set(DIVERGENCES)


@every_kind
@every_case
def test_values_are_finite_and_never_negative(name, kind):
    for vocabulary in sizes(kind):
        found = values(name, vocabulary, kind)
        assert found.isfinite().all(), vocabulary
        assert (found >= -slack(found)).all(), vocabulary


def rises(found: Tensor) -> Tensor:
    """By how much each width falls short of the one before, beyond rounding."""
    return (found[:-1] - found[1:] - slack(found[1:])).clamp(min=0)


def exceeds(found: Tensor) -> Tensor:
    """By how much each width is above the dense value, beyond rounding."""
    return (found[:-1] - found[-1] - slack(found[-1])).clamp(min=0)


VIOLATIONS = {"lower_bound": exceeds, "monotone": rises}
DECLARED = [(name, law) for name in CASES for law in VIOLATIONS if getattr(entry(name).laws, law)]


@every_kind
@pytest.mark.parametrize(("name", "law"), DECLARED)
def test_merging_ids_into_the_tail_lowers_the_value_where_declared(name, law, kind):
    violation = VIOLATIONS[law]
    for vocabulary in sizes(kind):
        assert (violation(values(name, vocabulary, kind)) == 0).all(), vocabulary


def test_akl_can_rise_where_ids_are_merged_and_therefore_declares_no_such_law():
    p, q = ([[0.6, 0.2, 0.15, 0.05]], [[0.8 - 1e-9, 1e-9, 0.05, 0.15]])
    teacher_NV, student_NV = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    merged, dense = (
        value("akl .5", buckets(teacher_NV, k), buckets(student_NV, k)) for k in (2, 4)
    )
    assert merged.item() > dense.item() + 0.4
    laws = entry("akl .5").laws
    assert not laws.lower_bound
    assert not laws.monotone


@every_kind
@every_case
def test_an_equal_student_has_the_declared_value_and_gradient(name, kind):
    laws, worst_value, worst_slope = entry(name).laws, 0.0, 0.0
    for vocabulary in sizes(kind):
        teacher_NV, _ = logits(vocabulary, kind)
        student_NV = teacher_NV.clone().requires_grad_()
        for k in widths(vocabulary):
            found = value(name, buckets(teacher_NV, k), buckets(student_NV, k))
            (slope_NV,) = torch.autograd.grad(found.sum(), student_NV)
            assert slope_NV.isfinite().all()
            worst_value = max(worst_value, found.abs().max().item())
            worst_slope = max(worst_slope, slope_NV.abs().max().item())
    bound = ROUNDING[teacher_NV.dtype]
    assert (worst_value < bound) == laws.zero_value, worst_value
    if laws.zero_gradient:
        assert worst_slope < bound


@every_kind
@every_case
def test_teacher_and_student_may_be_swapped_where_declared(name, kind):
    symmetric_at, given = entry(name).laws.symmetric_at, parameters(name)
    symmetric = symmetric_at is not None and all(given[k] == v for k, v in symmetric_at.items())
    differences = []
    for vocabulary in sizes(kind):
        for teacher, student in pairs(vocabulary, kind):
            one, other = value(name, teacher, student), value(name, student, teacher)
            differences.append(((one - other).abs() - slack(one)).clamp(min=0).max().item())
    assert (max(differences) == 0) == symmetric


@every_kind
@every_case
def test_no_value_exceeds_the_declared_bound(name, kind):
    bound = entry(name).laws.bound
    largest = max(values(name, v, kind).max().item() for v in sizes(kind))
    if bound is None:
        assert largest > 3
    else:
        limit = bound.of(**parameters(name))
        assert largest <= limit + ROUNDING[torch.promote_types(kind, torch.float32)]
        assert largest > min(3, 0.9 * limit), "the bound is loose"


@every_kind
@every_case
def test_gradients_are_finite_and_one_kept_id_has_one(name, kind):
    for vocabulary in sizes(kind):
        teacher_NV, start_NV = logits(vocabulary, kind)
        for k in widths(vocabulary):
            student_NV = start_NV.clone().requires_grad_()
            found = value(name, buckets(teacher_NV, k), buckets(student_NV, k))
            (slope_NV,) = torch.autograd.grad(found.sum(), student_NV)
            assert slope_NV.isfinite().all(), (vocabulary, k)
            if k == 1 and name != "taid 0":
                p_N, q_N = (x.softmax(-1)[:, 0] for x in (teacher_NV, start_NV))
                unlike_N = ((p_N - q_N).abs() > 1e-2) & (q_N > 1e-4) & (q_N < 1 - 1e-4)
                assert (slope_NV.abs().amax(-1)[unlike_N] > 1e-8).all(), vocabulary


@every_case
def test_float32_agrees_with_float64(name):
    for vocabulary in (3, 257):
        teacher_NV, student_NV = logits(vocabulary, torch.float32)
        for k in widths(vocabulary):
            narrow, wide = (
                value(name, buckets(teacher_NV.to(kind), k), buckets(student_NV.to(kind), k))
                for kind in (torch.float32, torch.float64)
            )
            torch.testing.assert_close(narrow.double(), wide, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("vocabulary", SIZES)
def test_jsd_at_beta_is_jsd_at_the_rest_with_the_roles_swapped(vocabulary):
    jsd = DIVERGENCES["jsd"].function
    for teacher, student in pairs(vocabulary, torch.float64):
        for continuous in (False, True):
            one = jsd(teacher, student, beta=0.1, continuous=continuous)
            other = jsd(student, teacher, beta=0.9, continuous=continuous)
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def test_continuous_jsd_tends_to_the_two_kls_and_the_plain_one_to_nothing():
    teacher, student = (buckets(x, 64) for x in logits(257, torch.float64))
    ratio_N = (teacher.kept_NK - student.kept_NK).abs().amax(-1)
    near_N = torch.maximum(ratio_N, (teacher.tail_N - student.tail_N).abs()) < 3
    assert near_N.sum() > 10
    jsd, ends = DIVERGENCES["jsd"].function, ("forward_kl", "reverse_kl")
    for end, beta in zip(ends, (1e-3, 1 - 1e-3), strict=True):
        kl_N = value(end, teacher, student)
        found_N = jsd(teacher, student, beta=beta, continuous=True)
        torch.testing.assert_close(found_N[near_N], kl_N[near_N], rtol=0.05, atol=1e-6)
        assert (jsd(teacher, student, beta=beta, continuous=False) < 0.01).all()

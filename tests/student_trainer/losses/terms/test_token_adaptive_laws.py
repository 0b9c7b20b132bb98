"""The laws that TKD and DKD declare, in both directions, for teachers of all sizes and sharpness.

At temperature 1, the one that ATKD knows. Log-probabilities stand in the teacher's order.

N positions   V vocabulary   K ids kept per position
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from student_trainer.losses.kernel.labelled import (
    LabelledBuckets,
    labelled_student,
    labelled_teacher,
)
from student_trainer.losses.terms.divergences import Laws
from student_trainer.losses.terms.token_adaptive import PARTS
from tests.student_trainer.losses.terms.test_divergence_laws import (
    KINDS,
    ROUNDING,
    VIOLATIONS,
    buckets,
    logits,
    sizes,
    slack,
    widths,
)

DIRECTIONS = ("forward", "reverse")
LABELS = ("likeliest", "any", "last")
LEAST_SHARE = 0.01  # of the shipped tail that is not the label: float32 tells no less of it well

every_part = pytest.mark.parametrize("name", PARTS)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_label = pytest.mark.parametrize("which", LABELS)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def scene(vocabulary: int, kind: torch.dtype, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both [N,V] and the labels [N]."""
    teacher_NV, student_NV = logits(vocabulary, kind, (1.0,))
    count = len(teacher_NV)
    generator = torch.Generator().manual_seed(vocabulary)
    any_N = torch.randint(0, vocabulary, (count,), generator=generator)
    places = {"likeliest": torch.zeros_like(any_N), "any": any_N}
    return teacher_NV, student_NV, places.get(which, torch.full_like(any_N, vocabulary - 1))


def pair(
    teacher_NV: Tensor, student_NV: Tensor, label_N: Tensor, k: int
) -> tuple[LabelledBuckets, LabelledBuckets]:
    """Teacher and student as the objective forms them; differentiable in the student's logits."""
    label_N1 = label_N[:, None]
    is_label_NK = torch.arange(k)[None] == label_N1
    log_p_NV, log_q_NV = (x.log_softmax(-1) for x in (teacher_NV, student_NV))
    outside_NV = (torch.arange(log_q_NV.shape[1]) >= k)[None] & (
        torch.arange(log_q_NV.shape[1])[None] != label_N1
    )
    none_N = ~outside_NV.any(-1)
    tail_N = log_q_NV.masked_fill(~(outside_NV | none_N[:, None]), -torch.inf).logsumexp(-1)
    tail_N = tail_N.masked_fill(none_N, -torch.inf)
    ids_NM = torch.cat([log_q_NV[:, :k], log_q_NV.gather(1, label_N1)], dim=1)
    teacher = labelled_teacher(
        buckets(teacher_NV, k),
        label_logprob_N=log_p_NV.gather(1, label_N1)[:, 0],
        is_label_NK=is_label_NK,
        student_tail_N=tail_N.detach(),
    )
    return teacher, labelled_student(ids_NM, tail_N, is_label_NK=is_label_NK)


def value(name: str, direction: str, teacher: LabelledBuckets, student: LabelledBuckets) -> Tensor:
    one, other = (teacher, student) if direction == "forward" else (student, teacher)
    return PARTS[name].function(one, other)


@cache
def values(name: str, direction: str, vocabulary: int, kind: torch.dtype, which: str) -> Tensor:
    """At every width [widths, N], of the positions whose tail float32 knows without the label."""
    teacher_NV, student_NV, label_N = scene(vocabulary, kind, which)
    ks = widths(vocabulary)
    found = [value(name, direction, *pair(teacher_NV, student_NV, label_N, k)).detach() for k in ks]
    known_N = torch.ones(len(label_N), dtype=torch.bool)
    if kind != torch.float64:
        p_NV = teacher_NV.double().softmax(-1)
        for k in ks:
            tail_NV = p_NV[:, k:]
            rest_NV = tail_NV.masked_fill(torch.arange(k, vocabulary) == label_N[:, None], 0)
            known_N &= (label_N < k) | (rest_NV.sum(-1) >= LEAST_SHARE * tail_NV.sum(-1))
    return torch.stack(found)[:, known_N]


@every_kind
@every_label
@every_direction
@every_part
def test_a_part_is_finite_never_negative_a_lower_bound_and_rises(name, direction, which, kind):
    assert PARTS[name].laws == Laws()
    for vocabulary in sizes(kind):
        found = values(name, direction, vocabulary, kind, which)
        assert found.isfinite().all(), vocabulary
        assert (found >= -slack(found)).all(), vocabulary
        for violation in VIOLATIONS.values():
            assert (violation(found) == 0).all(), (vocabulary, violation)
        if name == "atkd: TKD":
            assert ((found - found[-1]).abs() <= slack(found)).all(), "it depends on no k"


@every_kind
@every_label
@every_direction
@every_part
def test_an_equal_student_has_nothing_to_learn_and_gradients_are_finite(
    name, direction, which, kind
):
    bound = max(ROUNDING[torch.promote_types(kind, torch.float32)], 2e-5)  # of the label's clamp
    for vocabulary in sizes(kind):
        teacher_NV, start_NV, label_N = scene(vocabulary, kind, which)
        for k in widths(vocabulary):
            for logits_NV in (teacher_NV, start_NV):
                student_NV = logits_NV.clone().requires_grad_()
                found_N = value(name, direction, *pair(teacher_NV, student_NV, label_N, k))
                (slope_NV,) = torch.autograd.grad(found_N.sum(), student_NV)
                assert slope_NV.isfinite().all(), (vocabulary, k)
                if logits_NV is teacher_NV:
                    assert found_N.abs().max() < bound
                    assert slope_NV.abs().max() < bound

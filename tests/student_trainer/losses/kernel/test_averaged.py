"""Teachers are averaged per position with weights, exactly, at every temperature.

N positions   V vocabulary
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.config.losses import ATKD, JSD, ForwardKL, ReverseKL
from student_trainer.losses.kernel import averaged as kernel
from student_trainer.losses.kernel.averaged import AveragedHeads, AveragedStates
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from tests.student_trainer.losses.dense import Case, gradients, relative_error

F64 = torch.float64
SHARES = (0.7, 0.3)


def averaged(
    *, rows: tuple[int, ...] = (101, 101), shared: tuple[int, ...] = (101, 101)
) -> AveragedStates:
    """Teachers of different widths, whose heads may have rows beyond the shared ids."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    sizes = zip((24, 12), rows, strict=True)
    states = [(normal(37, width), Head(normal(size, width) / 3)) for width, size in sizes]
    each = [TeacherHead(head, ids) for (_, head), ids in zip(states, shared, strict=True)]
    heads = AveragedHeads.of(each, SHARES)
    pairs = zip(states, heads.heads, strict=True)
    teachers = tuple(TeacherStates(hidden_NE, head) for (hidden_NE, _), head in pairs)
    return AveragedStates(teachers, heads.shares)


def dense(targets: AveragedStates, temperature: float, vocabulary: int) -> Tensor:
    """log of the average of whole softmaxes, cut at the student's vocabulary, float64 [N,V]."""
    found = [
        (t.teacher.head.logits(t.hidden_NE)[:, :vocabulary] / temperature).softmax(-1)
        for t in targets.teachers
    ]
    return torch.stack([s * p for s, p in zip(SHARES, found, strict=True)]).sum(0).log()


@pytest.mark.parametrize("chunk_rows", [7, None])
def test_loss_and_gradients_equal_dense_float64(chunk_rows: int | None) -> None:
    case, targets = Case.random(bias=True), averaged(rows=(101, 120))
    terms = [ForwardKL(temperature=2.0, weight=0.5), ReverseKL(), JSD()]
    found = case.losses(terms=terms, targets=targets, chunk_rows=chunk_rows)
    student_NV = case.head.logits(case.hidden_ND)
    log_p, log_q = dense(targets, 1.0, 101), student_NV.log_softmax(-1)
    warm_p, warm_q = dense(targets, 2.0, 101), (student_NV / 2).log_softmax(-1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    values = {
        "forward_kl": 4 * (warm_p.exp() * (warm_p - warm_q)).sum(-1),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "jsd": torch.stack([(a.exp() * (a - log_m)).sum(-1) / 2 for a in (log_p, log_q)]).sum(0),
    }
    for name, value_N in values.items():
        torch.testing.assert_close(found.terms[name], value_N.detach())
    total = (0.5 * values["forward_kl"] + values["reverse_kl"] + values["jsd"]).sum()
    pairs = zip(gradients(found.loss, case), gradients(total, case), strict=True)
    assert all(relative_error(*pair) < 1e-9 for pair in pairs)
    kl_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.kl_N, kl_N.detach())


@pytest.mark.parametrize("shared", [(90, 90), (101, 90), (90, 101)])
def test_ids_that_one_teacher_does_not_share_are_the_tail_of_all(shared: tuple[int, int]) -> None:
    case, targets = Case.random(), averaged(rows=(101, 101), shared=shared)
    case = replace(case, label_N=case.label_N % 90)
    found = case.losses(terms=[ForwardKL()], targets=targets)
    log_p, log_q = dense(targets, 1.0, 101), case.head.logits(case.hidden_ND).log_softmax(-1)
    merged = [
        torch.cat([x[:, :90], x[:, 90:].logsumexp(-1, keepdim=True)], 1) for x in (log_p, log_q)
    ]
    kl_N = (merged[0].exp() * (merged[0] - merged[1])).sum(-1)
    torch.testing.assert_close(found.terms["forward_kl"], kl_N.detach())


def test_of_equal_teachers_the_average_is_either_one_and_order_and_shares_change_nothing() -> None:
    case, targets = Case.random(), averaged()
    one = targets.teachers[0]
    alone = case.losses(terms=[ATKD(), ForwardKL()], targets=one, columns=split())
    both = AveragedStates((one, one), (0.25, 0.75))
    found = case.losses(terms=[ATKD(), ForwardKL()], targets=both, columns=split())
    torch.testing.assert_close(found.terms, alone.terms)
    swapped = replace(targets, teachers=targets.teachers[::-1], shares=targets.shares[::-1])
    each = [case.losses(terms=[ReverseKL()], targets=t).terms for t in (targets, swapped)]
    torch.testing.assert_close(*each)
    assert (found.terms["forward_kl"] - each[0]["reverse_kl"]).abs().max() > 0.1


def split() -> dict[str, Tensor]:
    return {"hard_N": torch.arange(37) % 2 == 0, "class_weight_N": torch.ones(37, dtype=F64)}


@pytest.mark.parametrize("chunk_rows", [7, 37])
def test_the_likeliest_id_is_that_of_the_average(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "default_chunk_rows", lambda *args, **options: chunk_rows)
    targets = averaged()
    p_NV = dense(targets, 1.0, 101).exp()
    label_N = (p_NV.argmax(-1) + torch.arange(37) % 2) % 101  # every other one is right
    confidence_N, right_N, id_N = targets.top1(label_N)
    torch.testing.assert_close(confidence_N, p_NV.max(-1).values)
    assert right_N.tolist() == [place % 2 == 0 for place in range(37)]
    assert id_N.tolist() == p_NV.argmax(-1).tolist()
    assert targets.captured_mass().tolist() == [1.0] * 37

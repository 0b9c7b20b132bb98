"""The likeliest id beside dense logits in float64.

N positions   V vocabulary   D hidden width
"""

import pytest
import torch

from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.kernel.top1 import top1
from tests.allocations import largest_tensor
from tests.student_trainer.losses.kernel.test_likeliest import HEADS, N, V, problem


def dense(logits_NV: torch.Tensor, label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    highest_N, id_N = logits_NV.double().softmax(-1).max(-1)
    return highest_N, id_N == label_N


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [7, None])
def test_it_is_that_of_dense_logits(head, chunk_rows) -> None:
    hidden_ND, head, _ = problem(**head)
    logits_NV = head.logits(hidden_ND.double())
    label_N = torch.where(torch.arange(N) % 3 > 0, logits_NV.argmax(-1), 5)
    confidence_N, right_N = dense(logits_NV, label_N)
    found = top1(hidden_ND, head, label_N, chunk_rows=chunk_rows)
    torch.testing.assert_close(found.confidence_N.double(), confidence_N, atol=1e-6, rtol=1e-5)
    assert found.is_right_N.equal(right_N)
    assert 0 < int(right_N.sum()) < N


def test_a_teacher_that_ships_ids_or_states_says_the_same() -> None:
    _, head, hidden_NE = problem()
    logits_NV = head.logits(hidden_NE.double())
    label_N = torch.where(torch.arange(N) % 2 > 0, logits_NV.argmax(-1), 5)
    kept = logits_NV.log_softmax(-1).topk(4)
    order = torch.tensor([2, 0, 3, 1])  # a store may keep them in any order
    ids = TeacherTargets(
        kept.indices[:, order], kept.values[:, order].float(), torch.zeros(N, 1), (1.0,)
    )
    states = TeacherStates(hidden_NE, TeacherHead(head, V))
    expected = dense(logits_NV, label_N)
    for targets in (ids, states):
        confidence_N, right_N, id_N = targets.top1(label_N)
        torch.testing.assert_close(confidence_N.double(), expected[0], atol=1e-6, rtol=1e-5)
        assert right_N.equal(expected[1])
        assert id_N.equal(logits_NV.argmax(-1))


def test_drawn_ids_do_not_say_it() -> None:
    nothing_N = torch.zeros(3)
    targets = DrawnTargets(
        torch.zeros(3, 1, dtype=torch.long), nothing_N[:, None], *[nothing_N] * 2, 1.0
    )
    assert targets.top1(torch.zeros(3, dtype=torch.long)) is None


def test_no_tensor_of_positions_times_vocabulary_is_allocated() -> None:
    hidden_ND, head = torch.randn(512, 16), Head(torch.randn(4000, 16))
    label_N = torch.zeros(512, dtype=torch.long)
    assert largest_tensor(lambda: top1(hidden_ND, head, label_N, chunk_rows=32)) == 32 * 4000

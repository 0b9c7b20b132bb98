"""What the token loss takes of an accelerator's memory, counted on tensors that have no numbers.

They say that they are CUDA's, so that products and parts are as there, and are counted as long as
they live, from whichever operation they come. What an allocator or a library takes beside them is
not counted.

N positions   D width of both models   V vocabulary   K ids kept
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cluster.sizing.alive import Alive
from student_trainer.losses.kernel import fused
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets, TeacherTargets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses

V, D, K = 151_936, 2_048, 64
FORWARD_KL = SimpleNamespace(
    kind="forward_kl", weight=1.0, temperature=1.0, times_temperature_squared=True
)


def whole(teacher_ND: Tensor, teacher_VD: Tensor) -> Targets:
    """The teacher's states and head."""
    return TeacherStates(teacher_ND, TeacherHead(Head(teacher_VD), V))


def likeliest(teacher_ND: Tensor, teacher_VD: Tensor) -> Targets:
    """Its likeliest ids."""
    num = len(teacher_ND)
    ids_NK = teacher_ND.new_empty((num, K), dtype=torch.int64)
    logprobs_NK, tail_N1 = (teacher_ND.new_empty((num, n), dtype=torch.float32) for n in (K, 1))
    return TeacherTargets(ids_NK, logprobs_NK, tail_N1, (1.0,))


@pytest.mark.parametrize("targets_of", [whole, likeliest])
def test_65_536_positions_of_151_936_ids_take_less_than_2_gib_both_gradients_included(
    targets_of, monkeypatch
) -> None:
    """From two smaller numbers of positions, as each takes the same."""
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda tensor: True))
    parts = fused.parts
    monkeypatch.setattr(fused, "parts", lambda *chunk, on: parts(*chunk, on="cuda"))
    few, more = most_bytes(1_024, targets_of), most_bytes(2_048, targets_of)
    of_a_position = (more - few) / 1_024
    assert of_a_position >= 2 * D  # of the gradient
    assert more + (65_536 - 2_048) * of_a_position < 2 * 2**30


def most_bytes(num: int, targets_of: Callable[[Tensor, Tensor], Targets]) -> int:
    """Of a loss and its gradients in bfloat16, states, heads and targets apart."""
    with FakeTensorMode():
        states = [torch.empty(num, D, dtype=torch.bfloat16) for _ in range(2)]
        heads = [torch.empty(V, D, dtype=torch.bfloat16) for _ in range(2)]
        label_N = torch.empty(num, dtype=torch.int64)
        targets = targets_of(states[1], heads[1])
        fields = [getattr(targets, name) for name in targets.__dataclass_fields__]
        shipped = [field for field in fields if isinstance(field, Tensor)]
        hidden_ND, weight_VD = states[0].requires_grad_(), heads[0].requires_grad_()
        with Alive(*states, *heads, label_N, *shipped) as alive:
            token_losses(
                hidden_ND,
                Head(weight_VD),
                label_N=label_N,
                terms=terms_of([FORWARD_KL]),
                targets=targets,
            ).loss.backward()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        assert alive.bytes >= hidden_ND.grad.nbytes + weight_VD.grad.nbytes
    return alive.most

"""Match hidden states: the student's, through a learned projection, against the teacher's.

The values have no unit of information; one per position, without any reduction.

N positions   D student width   E teacher width
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True, slots=True)
class HiddenStatePairs:
    """Both models' states at the positions with loss, and the projections between them."""

    student_ND: Mapping[int, Tensor]  # student layer -> states
    teacher_NE: Mapping[int, Tensor]  # teacher layer -> states, float32 or bfloat16 bits
    projections: nn.ModuleDict  # str(teacher layer) -> Linear(D, E), float32


def mean_squared_error(projected_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """Mean over the width of the squared difference [N] (FitNets, arXiv 1412.6550, Eq. 3)."""
    return (projected_NE - teacher_NE).square().mean(-1)


def cosine_distance(projected_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """1 - cosine of the angle between the states [N] (DistilBERT, arXiv 1910.01108, section 3)."""
    return 1 - cosine_similarity(projected_NE, teacher_NE, dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
}


def projection(student_width: int, teacher_width: int) -> nn.Linear:
    """A fresh float32 projection from the student's width to the teacher's."""
    return nn.Linear(student_width, teacher_width, bias=False, dtype=torch.float32)


def native_states(states_NE: Tensor) -> Tensor:
    """States in the type they were shipped in, from numbers or from bits of bfloat16."""
    bits = states_NE.dtype in (torch.uint16, torch.int16)
    return states_NE.view(torch.bfloat16) if bits else states_NE


def decoded_states(states_NE: Tensor) -> Tensor:
    """Float32 states from what the teacher ships: float32, or uint16/int16 bits of bfloat16."""
    return native_states(states_NE).float()


def hidden_state_loss(
    pairs: HiddenStatePairs, *, layers: Mapping[int, int], distance: str
) -> Tensor:
    """Mean over the layer pairs of the distance between projected student and teacher [N].

    `layers` maps teacher layers to student layers. Computed in the projection's precision.
    """
    values = []
    for teacher_layer, student_layer in layers.items():
        linear = pairs.projections[str(teacher_layer)]
        student_ND = pairs.student_ND[student_layer].to(_precision(linear))
        teacher_NE = decoded_states(pairs.teacher_NE[teacher_layer])
        values.append(DISTANCES[distance](linear(student_ND), teacher_NE))
    return torch.stack(values).mean(0)


def _precision(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype

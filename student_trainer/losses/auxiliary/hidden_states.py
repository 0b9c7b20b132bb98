"""Match hidden states: the student's, through a learned projection, against the teacher's.

The values have no unit of information; one per position, without any reduction.

N positions   D student width   E teacher width
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from student_trainer.losses.auxiliary.auxiliary import OutputNeeds


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


class HiddenStateMatching:
    """Mean over pairs of layers of the distance between projected student and teacher.

    Computed in the projection's precision. The modules are the projections, by teacher layer.
    """

    def __init__(self, section: Any, modules: nn.ModuleDict) -> None:
        """`section`: weight, layers (teacher -> student), distance."""
        self._section, self._projections = section, modules

    @property
    def weight(self) -> float:
        """The section's."""
        return self._section.weight

    @property
    def needs(self) -> OutputNeeds:
        """The states of inner layers."""
        return OutputNeeds(("output_hidden_states",))

    def pick(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's states of its layers, `student_LAYER_ND`."""
        return {
            f"student_{layer}_ND": output.hidden_states[layer].flatten(0, 1)[batch["loss_index_N"]]
            for layer in sorted(set(self._section.layers.values()))
        }

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The distances [N]; the teacher's states are `teacher_LAYER_NE`, numbers or bits."""
        found = []
        for teacher_layer, student_layer in self._section.layers.items():
            linear = self._projections[str(teacher_layer)]
            student_ND = batch[f"student_{student_layer}_ND"].to(_precision(linear))
            teacher_NE = decoded_states(batch[f"teacher_{teacher_layer}_NE"])
            found.append(DISTANCES[self._section.distance](linear(student_ND), teacher_NE))
        return torch.stack(found).mean(0)


def _precision(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype

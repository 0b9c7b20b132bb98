"""Let the student's own deep layers teach its shallow ones (self-feature regularization, arXiv
2103.07350, withdrawn by its authors for errors in its data: nothing here stands on its numbers).

What it leaves open is a reconstruction: the distance is the mean squared error, between states of
the same position, over a learned projection of the shallow state or over averages of neighbouring
channels. Its label smoothing is left out.

N positions with loss   D student width   C channels that are compared
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.losses.auxiliary.auxiliary import OutputNeeds
from student_trainer.losses.auxiliary.hidden_states import projection


def own_projections(sections: Sequence[Any], width: int) -> dict[str, nn.Linear]:
    """Fresh projections of the shallow layers that learn through one, by their keys."""
    own = (s for s in sections if s.kind == "self_features")
    asked = (s for s in own if s.weight and s.group is None)
    return {_key(layer): projection(width, width) for s in asked for layer in s.layers}


class SelfFeatures:
    """Mean over pairs of layers of the squared distance of a shallow state from a deep one, which
    gets no gradient; 0, and nothing is read, where the weight is 0."""

    def __init__(self, section: Any, modules: nn.ModuleDict) -> None:
        """`section`: weight, layers (shallow -> deep), group; `modules` by the keys of
        `own_projections`."""
        self._section, self._projections = section, modules

    @property
    def weight(self) -> float:
        """The section's."""
        return self._section.weight

    @property
    def needs(self) -> OutputNeeds:
        """The states of inner layers, where it counts."""
        return OutputNeeds(("output_hidden_states",) if self.weight else ())

    def pick(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's states of its layers, `own_LAYER_ND`."""
        if not self.weight:
            return {}
        layers = sorted({*self._section.layers, *self._section.layers.values()})
        return {
            f"own_{layer}_ND": output.hidden_states[layer].flatten(0, 1)[batch["loss_index_N"]]
            for layer in layers
        }

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The distances [N], float32."""
        if not self.weight:
            return torch.zeros(batch["label_N"].shape, device=batch["label_N"].device)
        found = []
        for shallow, deep in self._section.layers.items():
            deep_ND = batch[f"own_{deep}_ND"].detach()
            ours_NC, theirs_NC = self._compared(shallow, batch[f"own_{shallow}_ND"], deep_ND)
            found.append((ours_NC - theirs_NC).square().mean(-1))
        return torch.stack(found).mean(0)

    def _compared(self, layer: int, shallow_ND: Tensor, deep_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Both states as they are compared [N, C], float32."""
        group = self._section.group
        if group is None:
            linear = self._projections[_key(layer)]
            weight: Any = linear.weight
            return linear(shallow_ND.to(weight.dtype)).float(), deep_ND.float()
        ours, theirs = (x.float().unflatten(-1, (-1, group)) for x in (shallow_ND, deep_ND))
        return ours.mean(-1), theirs.mean(-1)


def _key(layer: int) -> str:
    return f"own_{layer}"

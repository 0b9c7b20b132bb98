"""What a loss beside the logits is: an auxiliary, which reads the decoder's outputs.

The objective calls the decoder with what auxiliaries ask for, lets each pick its tensors, and adds
their values to the weighted sum. One is a class with an entry in `registry.AUXILIARIES` and a
section in the config.

N positions with loss
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from student_trainer.losses.token_losses import NOTHING, TokenLosses, weighted

MOVED = "moved."


@dataclass(frozen=True, slots=True)
class OutputNeeds:
    """What an auxiliary asks of the decoder: names of arguments that are set to true, as
    `output_hidden_states` or `output_router_logits`, and how far the embeddings are moved of which
    it reads a second output; 0: it reads none."""

    options: tuple[str, ...] = ()
    moved_by: float = 0.0


class Auxiliary(Protocol):
    """A loss per position on what the decoder gives beside its last states."""

    def __init__(self, section: Any, modules: nn.ModuleDict) -> None:
        """From a section of the config and the modules that train with the losses."""
        ...

    @property
    def weight(self) -> float:
        """What its values count in the sum of all losses."""
        ...

    @property
    def needs(self) -> OutputNeeds:
        """What it asks of the decoder."""
        ...

    def pick(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it reads of the decoder's output, by names that join the batch's; of the output on
        moved embeddings they begin with `MOVED`.

        `loss_index_N` of the batch are the positions with loss in the flattened output.
        """
        ...

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Its values [N], differentiable; `batch` holds what it picked and the teacher's side."""
        ...


def with_auxiliaries(
    found: TokenLosses,
    auxiliaries: Mapping[str, Auxiliary],
    batch: Mapping[str, Tensor],
    *,
    multiplier: float,
    weights: Mapping[str, Tensor] = NOTHING,
) -> TokenLosses:
    """A micro-batch's losses with the auxiliaries' added to the weighted sum, by their names;
    `multiplier` and `weights` as `token_losses` has them."""
    loss, values = found.loss, dict(found.terms)
    for name, auxiliary in auxiliaries.items():
        value_N = auxiliary.values(batch)
        loss = loss + multiplier * auxiliary.weight * weighted(value_N, weights.get(name)).sum()
        values[name] = value_N.detach()
    return replace(found, loss=loss, terms=values)

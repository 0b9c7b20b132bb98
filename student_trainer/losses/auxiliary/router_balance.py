"""Keep the experts of a mixture evenly used: the load-balancing loss of the student's routers.

As transformers computes it (Switch Transformer, arXiv 2101.03961, Eq. 4 to 6, over the layers
together): E * sum over experts of the share of tokens sent to it times its mean probability. A
token counts whether it has loss or not; padding does not. The shares carry no gradient.

B lines   T tokens   N positions with loss   E experts   K experts that a token is sent to
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.losses.auxiliary.auxiliary import OutputNeeds


def load_balance(router_logits: Sequence[Tensor], real_BT: Tensor, *, active: int) -> Tensor:
    """The loss, a number, of routers' logits [B * T, E] by layer over the real tokens; `active` is
    K, which is also the loss where all experts are used alike."""
    real_N = real_BT.flatten()
    logits_NE = torch.cat([layer.flatten(0, -2)[real_N] for layer in router_logits])
    probability_NE = logits_NE.float().softmax(-1)
    num_experts = logits_NE.shape[-1]
    sent_NK = probability_NE.topk(active, dim=-1).indices
    count = max(1, len(logits_NE))
    share_E = torch.bincount(sent_NK.flatten(), minlength=num_experts) / count
    return num_experts * (share_E * probability_NE.sum(0) / count).sum()


class RouterBalance:
    """The loss of the tokens that pass the model together, said of each position with loss.

    A step's is the mean over its micro-batches by tokens with loss, so it depends on how a step is
    cut, as it does in transformers: shares of experts are those of a micro-batch.
    """

    def __init__(self, section: Any, modules: nn.ModuleDict) -> None:
        """`section`: weight, experts_per_token."""
        self._section = section

    @property
    def weight(self) -> float:
        """The section's."""
        return self._section.weight

    @property
    def needs(self) -> OutputNeeds:
        """What the routers say of every token."""
        return OutputNeeds(("output_router_logits",))

    def pick(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss, `router_balance_N`, the same at each position."""
        width = batch["input_ids_BT"].shape[1]
        places_T = torch.arange(width, device=batch["length_B"].device)
        real_BT = places_T < batch["length_B"][:, None]
        found = load_balance(output.router_logits, real_BT, active=self._section.experts_per_token)
        return {"router_balance_N": found.expand(len(batch["loss_index_N"]))}

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What was picked [N]."""
        return batch["router_balance_N"]

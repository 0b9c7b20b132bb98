"""Keep the experts of a mixture evenly used: the load-balancing loss of the student's routers.

As transformers computes it (Switch Transformer, arXiv 2101.03961, Eq. 4 to 6, over the layers
together): E * sum over experts of the share of tokens sent to it times its mean probability. A
token counts whether it has loss or not; padding does not. The shares carry no gradient.

B lines   T tokens   N positions with loss, or real tokens   L layers with routers   E experts
K experts that a token is sent to
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.losses.auxiliary.auxiliary import OutputNeeds


def load_balance(
    router_logits: Sequence[Tensor], real_BT: Tensor, *, active: int
) -> tuple[Tensor, Tensor]:
    """The loss, a number, of routers' logits [B * T, E] by layer over the real tokens, and the
    tokens sent to each expert [L, E]; `active` is K, which is also the loss where all experts are
    used alike."""
    real_N = real_BT.flatten()
    logits_LNE = torch.stack([layer.flatten(0, -2)[real_N] for layer in router_logits])
    probability_LNE = logits_LNE.float().softmax(-1)
    num_layers, num_tokens, num_experts = logits_LNE.shape
    sent_LNK = probability_LNE.topk(active, dim=-1).indices
    first_L = num_experts * torch.arange(num_layers, device=sent_LNK.device)
    places = (sent_LNK + first_L[:, None, None]).flatten()
    tokens_LE = torch.bincount(places, minlength=num_layers * num_experts).unflatten(
        0, (num_layers, num_experts)
    )
    count = max(1, num_layers * num_tokens)
    share_E = tokens_LE.sum(0) / count
    loss = num_experts * (share_E * probability_LNE.sum((0, 1)) / count).sum()
    return loss, tokens_LE


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
        """The loss, `router_balance_N`, the same at each position, and the load of experts, as
        `load_balance` has them."""
        width = batch["input_ids_BT"].shape[1]
        places_T = torch.arange(width, device=batch["length_B"].device)
        real_BT = places_T < batch["length_B"][:, None]
        asked = {"active": self._section.experts_per_token}
        loss, tokens_LE = load_balance(output.router_logits, real_BT, **asked)
        num_positions = len(batch["loss_index_N"])
        return {"router_balance_N": loss.expand(num_positions), "expert_tokens_LE": tokens_LE}

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What was picked [N]."""
        return batch["router_balance_N"]

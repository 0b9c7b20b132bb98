"""Pull an entity towards a copy of itself and away from the words around it (CLLMFS, arXiv
2408.12834).

What public text leaves open is a reconstruction. An entity is the mean of a layer's states at its
tokens, where the student reads what it marks. Its positive is the same of a copy of the text, whose
embeddings are moved by `epsilon` along the gradient of the labels' NLL, token by token; its
negatives are the tokens of the same text outside of entities and marks. As one row is about one
type, these are words of no type and of others; other entities of the row's are neither. So rows do
not depend on what shares their micro-batch. An entity's loss is that of each of its tokens.

N positions with loss   E entities   D student width
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from student_trainer.losses.auxiliary.auxiliary import MOVED, OutputNeeds

STATES = "entity_states_ND"
ENTITIES = "entity_N"  # the number of a label's entity from 1; 0: other text, -1: a mark or an end


def info_nce(positive_E: Tensor, negative_EN: Tensor, counts_EN: Tensor, *, tau: float) -> Tensor:
    """-log(exp(p / tau) / (exp(p / tau) + sum of exp(n / tau))) of each entity [E], nats; `counts`
    says which cosines n are of its negatives."""
    asked_EN = (negative_EN / tau).masked_fill(~counts_EN, -torch.inf)
    own_E1 = positive_E[:, None] / tau
    return torch.cat([own_E1, asked_EN], dim=1).logsumexp(1) - own_E1[:, 0]


class EntityContrast:
    """InfoNCE over the entities of each text; 0 at positions of no entity."""

    def __init__(self, section: Any, modules: nn.ModuleDict) -> None:
        """`section`: weight, layer, tau, epsilon."""
        self._section = section

    @property
    def weight(self) -> float:
        """The section's."""
        return self._section.weight

    @property
    def needs(self) -> OutputNeeds:
        """The states of inner layers, also of a moved copy."""
        return OutputNeeds(("output_hidden_states",), moved_by=self._section.epsilon)

    def pick(self, output: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states at the labels' own tokens, each of which is one on."""
        states_ND = output.hidden_states[self._section.layer].flatten(0, 1)
        return {STATES: states_ND[batch["loss_index_N"] + 1]}

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The losses [N], float32."""
        entity_N, document_N = batch[ENTITIES], batch["document_N"]
        found, number_N = entity_N[entity_N > 0].unique(return_inverse=True)
        value_N = torch.zeros(entity_N.shape, device=entity_N.device)
        if not len(found):
            return value_N
        is_own_EN = entity_N == found[:, None]
        own_ED, copy_ED = (_means(batch[n].float(), is_own_EN) for n in (STATES, MOVED + STATES))
        states_ND = normalize(batch[STATES].float(), dim=-1)
        document_E = document_N[is_own_EN.int().argmax(1)]
        is_other_EN = (entity_N == 0) & (document_N == document_E[:, None])
        positive_E = (own_ED * copy_ED).sum(-1)
        loss_E = info_nce(positive_E, own_ED @ states_ND.T, is_other_EN, tau=self._section.tau)
        return value_N.masked_scatter(entity_N > 0, loss_E[number_N])


def _means(states_ND: Tensor, is_own_EN: Tensor) -> Tensor:
    """The mean state of each entity, of length 1 [E, D]."""
    return normalize(is_own_EN.to(states_ND.dtype) @ states_ND, dim=-1)

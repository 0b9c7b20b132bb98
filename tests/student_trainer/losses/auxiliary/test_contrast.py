"""Entities are pulled towards their moved copies and away from the words around them.

N positions with loss   D width
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shared.config.losses import EntityContrast as Section
from student_trainer.losses.auxiliary.auxiliary import MOVED
from student_trainer.losses.auxiliary.contrast import STATES, EntityContrast, info_nce

# Two texts: of the first two entities, of the second one; -1: a mark or an end.
ENTITY_N = torch.tensor([0, -1, 1, 1, -1, 0, -1, 2, -1, -1, 0, 0, -1, 3, 3, -1, 0, -1])
DOCUMENT_N = torch.tensor([0] * 10 + [1] * 8)


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    states = {name: torch.randn(len(ENTITY_N), 6) for name in (STATES, MOVED + STATES)}
    return states | {"entity_N": ENTITY_N, "document_N": DOCUMENT_N}


def values(batch: dict[str, Tensor], **options: float) -> Tensor:
    return EntityContrast(Section(layer=1, **options), nn.ModuleDict()).values(batch)


@pytest.mark.parametrize("negatives", [1, 4, 37])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_one_positive_among_n_negatives_that_are_alike_is_log_of_n_and_one(negatives, tau):
    found_E = info_nce(
        torch.tensor([0.3]),
        torch.full((1, negatives + 2), 0.3),
        torch.arange(negatives + 2)[None] < negatives,
        tau=tau,
    )
    assert found_E.item() == pytest.approx(math.log(negatives + 1), rel=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_values_are_those_of_each_entity_in_float64_and_0_elsewhere(tau):
    batch = batch_of()
    found_N = values(batch, tau=tau)
    own, moved = (batch[name].double() for name in (STATES, MOVED + STATES))
    expected_N = torch.zeros(len(ENTITY_N), dtype=torch.float64)
    for number in (1, 2, 3):
        at = number == ENTITY_N
        near = torch.cosine_similarity(own[at].mean(0), moved[at].mean(0), dim=0)
        around = (ENTITY_N == 0) & (DOCUMENT_N[at][0] == DOCUMENT_N)
        far = torch.cosine_similarity(own[at].mean(0)[None], own[around], dim=1)
        whole = (near / tau).exp() + (far / tau).exp().sum()
        expected_N[at] = -((near / tau).exp() / whole).log()
    torch.testing.assert_close(found_N.double(), expected_N, rtol=1e-5, atol=1e-6)


def test_a_text_has_its_values_whatever_shares_its_micro_batch():
    batch, together = batch_of(), values(batch_of())
    for document in (0, 1):
        own = document == DOCUMENT_N
        alone = values({name: value[own] for name, value in batch.items()})
        torch.testing.assert_close(alone, together[own])


def test_a_text_without_entities_has_no_loss():
    batch = batch_of() | {"entity_N": torch.where(ENTITY_N > 0, 0, ENTITY_N)}
    assert not values(batch).any()


def test_states_are_those_of_the_labels_own_tokens_in_the_layer():
    states = torch.arange(24.0).view(1, 8, 3)
    output = SimpleNamespace(hidden_states=[states, states + 100])
    loss = EntityContrast(Section(layer=1), nn.ModuleDict())
    found = loss.pick(output, {"loss_index_N": torch.tensor([2, 5])})
    assert torch.equal(found[STATES], states[0, [3, 6]] + 100)

"""The loss of a family's routers is there where its config asks for it and transformers has it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.config.losses import RouterBalance
from shared.model_parts import ROUTED
from student_trainer.models.probing import probe_ids
from student_trainer.models.routers import OtherRouterLoss, router_balance_of, routers_of
from tests.families.known import APART, REFUSED
from tests.families.making import FAMILIES, make_model

OTHERS = [family for family in FAMILIES if family not in {*APART, *REFUSED}]
pytestmark = pytest.mark.drill


@torch.no_grad()
def loss_of(model: Any) -> Tensor | None:
    """What plain transformers computes beside its logits."""
    try:
        output = model(input_ids=probe_ids(model, length=24), use_cache=False)
    except IndexError:  # its layers say nothing of their routers, and its own loss reads them
        return None
    return getattr(output, "aux_loss", None)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_has_the_loss_of_its_routers_that_transformers_has(family: str) -> None:
    model = make_model(family, seed=1)
    text = model.config.get_text_config()
    if not hasattr(text, ROUTED):
        pytest.skip("its config asks for no loss of routers")
    setattr(text, ROUTED, True)
    plain, asked = loss_of(model), router_balance_of(model.config)
    if asked is None:
        assert plain is None
        return
    task, student = SimpleNamespace(sees=False), SimpleNamespace(model=family)
    config: Any = SimpleNamespace(losses=[RouterBalance(**asked)], task=task, student=student)
    if plain is None:
        with pytest.raises(OtherRouterLoss, match=f"no loss of the routers of {family}; take"):
            routers_of(model, config)
        return
    layers, experts = routers_of(model, config)
    assert 1 <= layers <= 2 * text.num_hidden_layers
    assert experts == 4

"""The routers of a mixture of experts: the loss that a model's own config asks for.

B lines   T tokens
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.config.losses import RouterBalance
from shared.config.run import Config
from shared.errors import ConfigError
from shared.loading import first_line
from shared.model_parts import ROUTED, seeing_part_of, speaking_part_of

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k")
TOLERANCE = 1e-3  # relative; of bfloat16 logits, whose ties may fall either way


class OtherRouterLoss(ConfigError):
    """A model whose routers have no loss in transformers, or another one than ours."""


def router_balance_of(config: Any) -> dict[str, Any] | None:
    """Options of the loss that a config of transformers asks for with `output_router_logits`, and
    how much it counts; None where it asks for none, or for nothing."""
    text = config.get_text_config()
    if not getattr(text, ROUTED, False):
        return None
    places = (text, getattr(text, "ffn_config", None))  # DBRX has them there
    weight, active = (
        next((found for place in places for n in names if (found := getattr(place, n, None))), None)
        for names in (COEFFICIENTS, ACTIVE)
    )
    return {"weight": weight, "experts_per_token": active} if weight and active else None


def routers_of(model: Any, config: Config) -> tuple[int, int]:
    """How many layers of a causal language model of transformers have routers, and among how many
    experts each chooses, where their balance is asked for; (0, 0) elsewhere. Raises OtherRouterLoss
    where that loss is not what the model itself computes, on a probe."""
    section = next((s for s in config.losses if isinstance(s, RouterBalance)), None)
    if section is None or not section.weight:
        return 0, 0
    import torch

    from student_trainer.losses.auxiliary.router_balance import load_balance
    from student_trainer.models.probing import evaluating, probe_ids

    ids_BT = probe_ids(model, length=24)
    try:
        with torch.no_grad(), evaluating(model):
            expected, logits = (_seeing if config.task.sees else _speaking)(model, ids_BT)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, TypeError):  # its layers say nothing of their routers, or cannot be asked
        expected, logits = None, None
    except Exception as error:  # of the model's own code
        raise ConfigError(
            f"the loss of the routers of {config.student.model} cannot be computed: "
            f"{first_line(error)}; set {{kind: router_balance, weight: 0}} among losses"
        ) from error
    if logits and expected is not None:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool).to(logits[0].device)
        ours, _ = load_balance(logits, real_BT, active=section.experts_per_token)
        if bool((ours - expected).abs() <= TOLERANCE * expected.abs()):
            return len(logits), logits[0].shape[-1]
    name = config.student.model
    if not logits or expected is None:
        raise OtherRouterLoss(
            f"transformers has no loss of the routers of {name}; take router_balance out of losses"
        )
    raise OtherRouterLoss(
        f"{name} computes another loss of its routers than router_balance over "
        f"{section.experts_per_token} experts a token; set its experts_per_token to the model's, "
        "or its weight to 0"
    )


@contextmanager
def heard(language: Any, *, asked: bool = True) -> Iterator[list[Any]]:
    """A list that gets, where it is `asked` for, what the routers of a language model say in every
    pass of a `with`; the model around it, which sees, has no place for that in its output."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    found: list[Any] = []

    def ask(module: Any, given: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return given, options | {ROUTED: True}

    def take(module: Any, given: tuple, output: Any) -> Any:
        found.append(output.get("router_logits"))
        rest = {name: value for name, value in output.items() if name != "router_logits"}
        return BaseModelOutputWithPast(**rest)

    hooks = []
    if asked:
        hooks.append(language.register_forward_pre_hook(ask, with_kwargs=True))
        hooks.append(language.register_forward_hook(take))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _speaking(model: Any, ids_BT: Any) -> tuple[Any, Any]:
    """The loss of its routers that a model itself computes, and what they say of each layer; None
    where it has neither."""
    found = model(input_ids=ids_BT, output_router_logits=True, use_cache=False)
    return getattr(found, "aux_loss", None), getattr(found, "router_logits", None)


def _seeing(model: Any, ids_BT: Any) -> tuple[Any, Any]:
    """The same of one that sees; the loss is that of the family of its language model."""
    language = speaking_part_of(seeing_part_of(model))
    with heard(language) as said:
        model(input_ids=ids_BT, use_cache=False)
    (logits,), text = said, model.config.get_text_config()
    family = sys.modules[type(language).__module__]
    balance = getattr(family, "load_balancing_loss_func", None)
    active = next((n for name in ACTIVE if (n := getattr(text, name, None))), None)
    if balance is None or not logits or active is None:
        return None, logits
    return balance(logits, logits[0].shape[-1], active), logits

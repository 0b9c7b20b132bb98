"""Upcycling: a dense model as a sparse mixture of experts that are copies of its FFNs.

Every expert begins as the FFN it comes from and the gates of a token sum to 1, so that the mixture
computes what the dense model does until it learns (sparse upcycling, arXiv 2212.05055; LLaVA-MoD,
arXiv 2408.15881). It is one of transformers' own mixtures, so its exports need nothing of ours.

E experts   D width   I width of an FFN
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from shared.config.models.student import Upcycle
from shared.errors import ConfigError
from shared.loading import auto_class_of, first_line
from shared.model_parts import decoder_of, tolerance
from student_trainer.models.probing import evaluating, probe_ids

# Width of the expert for all tokens that Qwen2-MoE has beside the others: its weights are 0 and so
# are their gradients, so it stays out. ZeRO-3 holds no empty weights, and a server may cut it in so
# many parts.
INERT = 8
# Of a layer, of a language model alone or beside what sees.
FFN = r"(?P<ffn>model\.((language|text)_model\.)?layers\.(?P<layer>\d+)\.mlp)"
EXPERTS = re.compile(rf"{FFN}\.experts\.(?P<part>gate_up|down)_proj")
ROUTER = re.compile(rf"{FFN}\.gate\.weight")
SHARED = re.compile(rf"{FFN}\.shared_expert(_gate|\..*)\.weight")
# Of a dense config: its class, and what the mixture says in its own words.
LEFT_OUT = ("model_type", "architectures", "transformers_version", "dtype", "mlp_bias", "id2label")
ALL_SPARSE = "mixtral"  # has experts in every layer, and no way to say otherwise


@dataclass(frozen=True, slots=True)
class Family:
    """The mixtures that hold a family's layers."""

    every_layer: str  # the type of model with experts in every layer
    some_layers: str  # and in some


FAMILIES = {
    "llama": Family("mixtral", "qwen2_moe"),
    "mistral": Family("mixtral", "qwen2_moe"),
    "qwen2": Family("qwen2_moe", "qwen2_moe"),
    "qwen3": Family("qwen3_moe", "qwen3_moe"),
}


def upcycled(dense: PreTrainedModel, asked: Upcycle, *, name: str, seed: int) -> PreTrainedModel:
    """The mixture that a dense model becomes, in its dtype, routers drawn from `seed`. Raises
    ConfigError for a model that no mixture of transformers holds, which is tried on a probe."""
    kind = _kind_of(dense, asked, name)
    try:
        config = _around(dense, AutoConfig.for_model(kind, **_settings(dense, asked, kind)))
        auto_model: Any = getattr(transformers, auto_class_of(config))
        sparse: Any = auto_model.from_config(
            config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation
        )
    except (ValueError, TypeError, AttributeError) as error:  # of the mixture's own checks
        raise _refused(
            name, f"{kind} cannot be made with its config: {first_line(error)}"
        ) from error
    _fill(sparse, dense, name=name, kind=kind, seed=seed)
    sparse.generation_config = dense.generation_config
    _refuse_other_logits(sparse, dense, name=name, kind=kind)
    return sparse


def sparse_layers(asked: Upcycle, num_layers: int) -> list[int]:
    """The layers whose FFN becomes experts, from the first on."""
    return list(range(0, num_layers, asked.every))


def freeze_all_but_experts(model: nn.Module) -> None:
    """Let experts and routers of a mixture alone train."""
    for name, parameter in model.named_parameters():
        if not (EXPERTS.fullmatch(name) or ROUTER.fullmatch(name)):
            parameter.requires_grad_(False)


def refuse_without_experts(model: nn.Module, *, name: str) -> None:
    """Raise ConfigError for a dense student whose config has `upcycle`: nobody made its mixture."""
    if not any(EXPERTS.fullmatch(weight) for weight, _ in model.named_parameters()):
        raise ConfigError(
            f"student.upcycle asks for experts, and {name} has none; the mixture is made by "
            "cluster.planning.loading.made, which every command begins with"
        )


def refuse_idle_experts(adapted: nn.Module, *, name: str) -> None:
    """Raise ConfigError for adapters on an upcycled student none of which is on its experts, which
    would stay copies of each other. peft knows the experts of some mixtures alone."""
    trained = (n for n, weight in adapted.named_parameters() if weight.requires_grad)
    if not any(".mlp.experts." in n for n in trained):
        raise ConfigError(
            f"student.train has adapters on none of the experts of {name}, which would stay copies "
            "of each other; set student.train.kind=full, let target_modules be all-linear, or, of "
            "a Llama or Mistral student, set student.upcycle.every=1"
        )


def _kind_of(dense: PreTrainedModel, asked: Upcycle, name: str) -> str:
    """The type of the mixture."""
    config: Any = dense.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise _refused(
            name,
            f"it is a {config.model_type}, whose FFNs none of transformers' mixtures is known to "
            f"hold as they are, as those of {known}",
        )
    num_layers = config.num_hidden_layers
    everywhere = len(sparse_layers(asked, num_layers)) == num_layers
    kind = family.every_layer if everywhere else family.some_layers
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind != ALL_SPARSE and (
        windows or (config.model_type == "mistral" and config.sliding_window)
    ):
        raise _refused(
            name,
            f"it reads through a window of {config.sliding_window} tokens, which {kind} would not; "
            f"with student.upcycle.every=1 it becomes a {family.every_layer}",
        )
    return kind


def _settings(dense: PreTrainedModel, asked: Upcycle, kind: str) -> dict[str, Any]:
    """The mixture's config: the dense one's, experts, and the loss of the routers, for which a
    model that sees has no place; the run's losses then have it."""
    config: Any = dense.config.get_text_config()
    kept = {k: v for k, v in config.to_dict().items() if k not in LEFT_OUT and v is not None}
    sparse = sparse_layers(asked, config.num_hidden_layers)
    kept |= {
        "num_experts_per_tok": asked.top_k,
        "output_router_logits": config is dense.config,
        "router_aux_loss_coef": Upcycle.balance,
    }
    if kind == ALL_SPARSE:
        kept.pop("layer_types", None)
        return kept | {
            "num_local_experts": asked.experts,
            "sliding_window": getattr(config, "sliding_window", None),
        }
    kept |= {
        "num_experts": asked.experts,
        "norm_topk_prob": True,
        "moe_intermediate_size": config.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(config.num_hidden_layers) if n not in sparse],
        "use_sliding_window": False,
    }
    if kind == "qwen2_moe":
        language: Any = decoder_of(dense)
        attention = language.layers[0].self_attn
        kept |= {
            "qkv_bias": attention.q_proj.bias is not None,
            "shared_expert_intermediate_size": INERT,
        }
    return kept


def _around(dense: PreTrainedModel, text: Any) -> Any:
    """The config of the whole mixture, whose language model has the config `text`."""
    whole: Any = dense.config
    if whole.get_text_config() is whole:
        return text
    around = copy.deepcopy(whole)
    around.text_config = text
    return around


@torch.no_grad()
def _fill(sparse: nn.Module, dense: nn.Module, *, name: str, kind: str, seed: int) -> None:
    """Give every weight of a mixture its value. Raises ConfigError where the dense model has
    weights that the mixture has no place for, or none for one of its places."""
    own, left = dense.state_dict(), set(dense.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for place, weight in sparse.state_dict().items():
        sources = _sources(place)
        if not sources and place not in own:
            _begin(place, weight, sparse, generator, name=name, kind=kind)
            continue
        found = [own.get(source) for source in sources or (place,)]
        if any(part is None for part in found):
            raise _refused(name, f"it has no {sources[0]}, the FFN that layer is to take")
        whole = torch.cat(found)  # type: ignore[arg-type]
        if whole.shape != weight.shape[-whole.dim() :]:
            raise _refused(name, f"{place} of {kind} has other sizes than its own")
        weight.copy_(whole.expand_as(weight))
        left -= set(sources or (place,))
    if left:
        raise _refused(name, f"{kind} has no place for {len(left)} of its weights, as {min(left)}")


def _sources(place: str) -> tuple[str, ...]:
    """The weights of an FFN that lie one below the other in an expert tensor [E, 2 I, D] or
    [E, D, I]; empty for another weight."""
    found = EXPERTS.fullmatch(place)
    if found is None:
        return ()
    parts = ("gate", "up") if found["part"] == "gate_up" else ("down",)
    return tuple(f"{found['ffn']}.{part}_proj.weight" for part in parts)


def _begin(
    place: str, weight: Tensor, sparse: Any, generator: torch.Generator, *, name: str, kind: str
) -> None:
    """A fresh weight: a router's is drawn, that of an expert for all tokens is 0."""
    if ROUTER.fullmatch(place):
        spread = sparse.config.get_text_config().initializer_range
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    elif SHARED.fullmatch(place):
        weight.zero_()
    else:
        raise _refused(name, f"{kind} has {place}, which it has not")


@torch.no_grad()
def _refuse_other_logits(sparse: Any, dense: Any, *, name: str, kind: str) -> None:
    """Raise ConfigError where the mixture computes something else than the dense model."""
    ids_BT = probe_ids(dense, length=16)
    logits = []
    for model in (dense, sparse):
        with evaluating(model):
            logits.append(model(input_ids=ids_BT, use_cache=False).logits.float())
    bound = tolerance(dense.dtype) * logits[0].abs().max()
    if not bool((logits[0] - logits[1]).abs().max() <= bound):
        raise _refused(name, f"{kind} computes other logits with the same weights")


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"student.upcycle: {name} cannot become a mixture of experts: {why}; leave student.upcycle "
        "out, or name another student"
    )

"""Where a causal language model of transformers keeps its decoder, and what its config says stands
between head and logits.

Both are guesses from names, which families give in many ways: whoever uses them proves them on a
probe. Models are looked at, never imported or run, so that torch is not needed here.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")
CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

ROUTED = "output_router_logits"  # a config's: whether the loss of its routers is asked for
LANGUAGE = ("language_model", "text_model")

# Names of weights in files that no model computes with: tables of positions and masks that earlier
# versions saved, and scales of a cache in few bits.
TABLES = re.compile(
    r"rotary|inv_freq|position_ids|masked_bias|causal_mask|attn_mask|bias_mask"
    r"|(cos|sin)_cached|(^|\.)[qkv]_scale$"
)
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")

# What logits, or states, that should be the same may differ by, relative to the largest: those of a
# model and of its parts before a run, and those of training and of its export after it. In 16 bits
# more is allowed where a batch of other sizes, or another device, adds in another order.
TOLERANCE = {"float32": 1e-4}
COARSE_TOLERANCE = 2e-2
REORDERED_TOLERANCE = 5e-2


@dataclass(frozen=True, slots=True)
class LogitFormula:
    """logits = cap(scale * head(hidden)), where cap(x) = soft_cap * tanh(x / soft_cap)."""

    scale: float = 1.0
    soft_cap: float | None = None


def tolerance(dtype: object, *, reordered: bool = False) -> float:
    """The share of the largest logit that logits in a dtype, of torch or by name, may be off;
    `reordered` are those of batches of other sizes, or of another device."""
    coarse = REORDERED_TOLERANCE if reordered else COARSE_TOLERANCE
    return TOLERANCE.get(str(dtype).removeprefix("torch."), coarse)


def decoder_of(model: Any) -> Any | None:
    """What turns token ids into the states that the head reads; None where nothing in the model
    but the whole of it takes ids."""
    head = model.get_output_embeddings()
    named = (model.get_decoder(), getattr(model, "base_model", None))
    for part in (*named, *model.children()):
        if part is not None and part is not model and part is not head and takes(part, "input_ids"):
            return part
    return None


def seeing_part_of(model: Any) -> Any | None:
    """What turns token ids and the pixels of images into those states; None in a model of text
    alone."""
    part = getattr(model, "base_model", None)
    sees = part is not None and part is not model and takes(part, "pixel_values")
    return part if sees and takes(part, "input_ids") else None


def speaking_part_of(decoder: Any) -> Any:
    """Of a decoder that sees what reads states alone, a language model as transformers calls it."""
    parts = dict(decoder.named_children())
    return next(parts[name] for name in LANGUAGE if name in parts)


def takes(module: Any, argument: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def read_by(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of named tensors that a module's forward reads, in the module's own dtype."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    read = {name: tensor for name, tensor in tensors.items() if takes(module, name)}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in read.items()}


def token_types_of(module: Any) -> str | None:
    """The argument by which a model that sees is told which tokens are images; None where it finds
    them by itself."""
    names = ("mm_token_type_ids", "token_type_ids")
    return next((name for name in names if takes(module, name)), None)


def longest_context(text_config: Any) -> int | None:
    """Tokens that a model reads at most; None where it has no limit, which some call -1."""
    named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    limit = next((found for n in named if (found := getattr(text_config, n, None))), None)
    return limit if limit is not None and limit > 0 else None


def pad_with(model: Any, tokenizer: Any) -> int:
    """Let a model that reads a text's last token know what is none, and return that id: its own
    padding token, its tokenizer's, or what ends a text."""
    text = model.config.get_text_config()
    choices = (
        getattr(text, "pad_token_id", None),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        0,
    )
    rows: int = model.get_input_embeddings().weight.shape[0]
    found = next(id_ for id_ in choices if id_ is not None and 0 <= id_ < rows)
    for part in (model.config, text):
        part.pad_token_id = found
    return found


def longest_text(model: Any) -> int | None:
    """Tokens that a loaded sequence classifier reads at most; None where it has no limit."""
    limit = longest_context(model.config.get_text_config())
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # positions may count from behind it
    return limit if limit is None or padding is None else limit - padding - 1


def why_incomplete(model: Any, unexpected: Iterable[str]) -> str | None:
    """Why a model is not the one whose weights were read: its config leaves some of them out, of
    the names in its files that it has no place for, `unexpected`. None where those do not change
    what it computes of a text: they lie beside the decoder, as a tower, or predict further tokens.
    """
    modules, text = dict(model.named_modules()), model.config.get_text_config()
    ours = (decoder_of(model), model.get_output_embeddings())
    inside = {id(m) for part in ours if part is not None for m in part.modules()}
    known = {name: module for name, module in modules.items() if id(module) in inside}
    further = sum(getattr(text, name, None) or 0 for name in FURTHER_LAYERS)
    base = getattr(model, "base_model_prefix", "")  # which files of a bare decoder leave out
    left = [
        name
        for name in sorted(unexpected)
        if any(_is_part(n, known, further=further) for n in (name, f"{base}.{name}"))
    ]
    if not left:
        return None
    return (
        f"its files hold weights that its config.json leaves out, {len(left)} in all, as "
        f"{left[0]}; get both from one model"
    )


def _is_part(name: str, known: Mapping[str, Any], *, further: int) -> bool:
    """Whether a weight without a place belongs to a part that has other weights, or to a layer, of
    which `further` beyond the last predict further tokens; `known` are modules by name."""
    parent = known.get(name.rpartition(".")[0])
    if parent is not None:
        return any(True for _ in parent.parameters(recurse=False))
    indexed = re.match(r"(.+?)\.(\d+)\.", name)
    layers: Any = known.get(indexed[1]) if indexed else None
    if not indexed or not hasattr(layers, "__len__") or TABLES.search(name):
        return False
    return not len(layers) <= int(indexed[2]) < len(layers) + further


def logit_formulas(text_config: Any) -> Iterator[LogitFormula]:
    """What a config may mean, the likeliest first: most families divide by `logits_scaling`, one
    multiplies, and a field may be one that its family does not read."""
    multiplied = _product(text_config, MULTIPLIED)
    divided = _product(text_config, DIVIDED)
    caps = (getattr(text_config, name, None) for name in CAPPED)
    cap = next((float(found) for found in caps if found), None)
    scales = dict.fromkeys((multiplied / divided, multiplied * divided, 1.0))
    for meant in dict.fromkeys((cap, None)):
        yield from (LogitFormula(scale, meant) for scale in scales)


def not_finite(model: Any) -> str | None:
    """The name of the first weight with a value that is NaN or infinite; weights in few bits are
    not looked at."""
    return next(
        (
            name
            for name, weight in model.named_parameters()
            if weight.is_floating_point() and not bool(weight.detach().isfinite().all())
        ),
        None,
    )


def num_weights(parameter: Any) -> int:
    """How many weights a parameter holds; nf4 packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _product(config: Any, names: tuple[str, ...]) -> float:
    found = 1.0
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            found *= float(value)
    return found

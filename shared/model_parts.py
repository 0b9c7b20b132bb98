"""Where a causal language model of transformers keeps its decoder, and what its config says stands
between head and logits.

Both are guesses from names, which families give in many ways: whoever uses them proves them on a
probe. Models are looked at, never imported or run, so that torch is not needed here.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")
CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# What the decoder and the head of one model may differ by from the model itself, relative to the
# largest logit; a head counts in float32 what a coarser model rounds.
TOLERANCE = {"float32": 1e-4}
COARSE_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class LogitFormula:
    """logits = cap(scale * head(hidden)), where cap(x) = soft_cap * tanh(x / soft_cap)."""

    scale: float = 1.0
    soft_cap: float | None = None


def tolerance(dtype: object) -> float:
    """The share of the largest logit that a probe in a dtype, of torch or by name, may be off."""
    return TOLERANCE.get(str(dtype).removeprefix("torch."), COARSE_TOLERANCE)


def decoder_of(model: Any) -> Any | None:
    """What turns token ids into the states that the head reads; None where nothing in the model
    but the whole of it takes ids."""
    head = model.get_output_embeddings()
    named = (model.get_decoder(), getattr(model, "base_model", None))
    for part in (*named, *model.children()):
        if part is not None and part is not model and part is not head and takes(part, "input_ids"):
            return part
    return None


def takes(module: Any, argument: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def longest_context(text_config: Any) -> int | None:
    """Tokens that a model reads at most; None where it has no limit, which some call -1."""
    named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    limit = next((found for n in named if (found := getattr(text_config, n, None))), None)
    return limit if limit is not None and limit > 0 else None


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


def _product(config: Any, names: tuple[str, ...]) -> float:
    found = 1.0
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            found *= float(value)
    return found

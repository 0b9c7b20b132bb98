"""Implementations of attention that a config may ask for, and sentences about those that cannot be
had."""

from collections.abc import Container
from typing import Any, Literal

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

INSTALLED_BY = {"flash_attention_2": "flash_attn"}  # packages beyond torch


def attend(config: Any, attention: Attention) -> None:
    """Write the attention that is asked for into a config of transformers, over what its file asks
    for. Under auto the file's choice stands; one that this machine has no package for gives way to
    the library's own."""
    if attention != "auto":
        config._attn_implementation = attention
        return
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    chosen = [getattr(part, "_attn_implementation", None) for part in parts]
    if not all(map(_is_there, filter(None, chosen))):
        config._attn_implementation = None


def _is_there(chosen: str) -> bool:
    """Whether what an attention is computed by is installed."""
    from transformers.utils import import_utils

    is_flash, is_kernel = chosen.startswith("flash_attention"), "/" in chosen
    if not is_flash and not is_kernel:
        return True
    version = chosen.removeprefix("flash_attention_")
    known = getattr(import_utils, f"is_flash_attn_{version}_available", None)
    return import_utils.is_kernels_available() or (known is not None and known())


def offered_by(model_class: Any) -> tuple[str, ...]:
    """The implementations that a class of transformers has."""
    has = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    return ("eager", *(name for name, flag in has.items() if getattr(model_class, flag, False)))


def refusal(
    option: str,
    attention: Attention,
    *,
    model: str,
    offered: Container[str] | None,
    installed: bool,
    gpus: float,
    dtype: str,
) -> str | None:
    """Why a model cannot attend as asked, with the way out; None where it can, as far as its class
    (`offered`; None: unknown) and this machine tell. `option` is the one that asks."""
    leave = f"set {option}=auto, which takes what there is"
    if attention == "auto":
        return None
    if offered is not None and attention not in offered:
        return f"{option} is {attention}, which the architecture of {model} does not have; {leave}"
    if attention not in INSTALLED_BY:
        return None
    if not installed:
        package = INSTALLED_BY[attention]
        return f"{option} is {attention}, and {package} is not installed; install it, or {leave}"
    section = option.rpartition(".")[0]
    if not gpus:
        return f"{option} is {attention}, which needs a GPU; set {section}.gpus, or {leave}"
    if dtype == "float32":
        return (
            f"{option} is {attention}, which computes in 16 bits alone; set "
            f"{section}.dtype=bfloat16, or {leave}"
        )
    return None

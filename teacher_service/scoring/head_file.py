"""The teacher's head as a file in the cache, for students that form its logits themselves.

V head rows   D hidden width
"""

import uuid
from pathlib import Path

import torch
from safetensors.torch import save_file

from shared.errors import ConfigError, StorageError
from shared.files import obey_umask
from shared.targets.asks.head_location import ShippedHead, StatesEncoding, head_path
from shared.text.digests import digest_file
from teacher_service.scoring.scoring import ScoringHead

STATES: dict[torch.dtype, StatesEncoding] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


def save_head(head: ScoringHead, cache: str | Path | None) -> ShippedHead:
    """Write a head, unless its file is there; the same head always has the same bytes.

    Raises ConfigError for a head that is not one plain matrix in this process, StorageError where
    the cache takes nothing.
    """
    weight_VD = head.weight_VD
    if weight_VD.is_meta or weight_VD.dtype not in STATES:
        place = "on no device of its own" if weight_VD.is_meta else f"of {weight_VD.dtype}"
        raise ConfigError(
            f"the teacher's head is {place}, so it cannot be shipped whole; remove targets.exact, "
            "or load the teacher in bfloat16 on devices that hold it"
        )
    if cache is None:
        raise ConfigError("the teacher service has no cache to keep its head in; set paths.cache")
    folder = head_path(cache, "").parent
    aside = folder / f"{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(head), aside)
        obey_umask(aside)
        digest = digest_file(aside)
        aside.replace(path := head_path(cache, digest))
        num_bytes = path.stat().st_size
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(
            f"the teacher's head cannot be written in {folder}: {error.strerror}; free some space "
            "or set another paths.cache"
        ) from error
    return ShippedHead(digest, STATES[weight_VD.dtype], weight_VD.shape[1], num_bytes)


def _tensors(head: ScoringHead) -> dict[str, torch.Tensor]:
    found = {"weight": head.weight_VD, "logit_scale": _number(head.logit_scale)}
    if head.bias_V is not None:
        found["bias"] = head.bias_V
    if head.soft_cap is not None:
        found["soft_cap"] = _number(head.soft_cap)
    # Copied: a tied or sliced weight shares memory, which the format does not take.
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def _number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)

"""What an export of a whole student holds, tried before it trains: files, and names, sizes and ties
of weights, as transformers reads them back. No value is written or read, so that a large student
takes no longer than a small one.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from shared.config.models.student import Student as StudentConfig
from shared.errors import ConfigError
from shared.loading import first_line
from student_trainer.tasks.task import ModelKind

ALIGNMENT = 8  # bytes, of a header of safetensors
STORED_AS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def buffers_of(model: Any) -> dict[str, Tensor]:
    """What a model saves beside its parameters, by name."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: found for name, found in model.state_dict().items() if name not in names}


def refuse_unsaveable(model: PreTrainedModel, asked: StudentConfig, kind: ModelKind) -> None:
    """Raise ConfigError for a model of which transformers would not read the same weights back."""
    told = f"student.model: an export of {asked.model} would not be what was trained"
    way_out = "set student.train.kind=lora, or choose another student"
    try:
        with TemporaryDirectory() as folder:
            _save_hollow(model, Path(folder))
            auto_model: Any = getattr(transformers, kind.auto_class)
            found, info = auto_model.from_pretrained(
                folder,
                dtype="auto",
                device_map={"": "meta"},
                trust_remote_code=asked.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # of a model's own code and of every library it needs
        raise ConfigError(
            f"{told}, since it cannot be loaded: {first_line(error)}; {way_out}"
        ) from (error)
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    kept, expected = _weights(found), _weights(model)
    lost += [name for name in expected if kept.get(name) != expected[name]]
    if lost:
        names = sorted(set(lost))
        raise ConfigError(f"{told} at {len(names)} weights, as {names[0]}; {way_out}")


def _weights(model: Any) -> dict[str, tuple]:
    """By name, a weight's sizes, dtype and the first name of the same weight."""
    first: dict[int, str] = {}
    return {
        name: (*weight.shape, weight.dtype, first.setdefault(id(weight), name))
        for name, weight in model.named_parameters(remove_duplicate=False)
    }


def _save_hollow(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with all that `save_pretrained` writes, but weights without values."""
    model.save_pretrained(folder, state_dict={})
    named = dict(model.named_parameters()) | buffers_of(model)
    for name in model._keys_to_ignore_on_save or ():
        named.pop(name, None)
    hollow = {name: weight.detach().to("meta") for name, weight in named.items()}
    own = remove_tied_weights_from_state_dict(hollow, model)
    _write_hollow(folder / "model.safetensors", revert_weight_conversion(model, own))


def _write_hollow(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a file of safetensors whose values lie in a hole, which takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, weight in weights.items():
        start, stop = stop, stop + weight.numel() * weight.element_size()
        header[name] = {
            "dtype": STORED_AS[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, stop],
        }
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(file.tell() + stop)

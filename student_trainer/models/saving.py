"""What an export of a whole student holds, tried before it trains: files, and names, sizes and ties
of weights, as transformers reads them back. No value of a model of transformers is written or read,
so that a large student takes no longer than a small one; a model of its own code is saved and
loaded as an export is, and its config and its logits are compared.
"""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from shared.config.models.student import Student as StudentConfig
from shared.errors import ConfigError, StorageError, reason_of
from shared.loading import first_line
from shared.model_parts import tolerance
from student_trainer.models.probing import evaluating, probe_ids
from student_trainer.tasks.task import ModelKind

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# Fields of a config.json that say nothing of what the model computes.
OF_THE_FILE = {"transformers_version", "auto_map", "architectures", "dtype"}
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
    """Raise ConfigError for a model of which transformers would not read the same back."""
    told = f"student.model: an export of {asked.model} would not be what was trained"
    way_out = "set student.train.kind=lora, or choose another student"
    try:
        with TemporaryDirectory() as folder:
            found, info = _again(model, Path(folder), asked, kind)
        off, most = _difference(model, found) if model.is_custom_code() else (0.0, 0.0)
    except (StorageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a model's own code and of every library it needs
        if getattr(error, "errno", None) in NO_ROOM:
            raise _no_room(asked, error) from error
        raise ConfigError(
            f"{told}, since it cannot be loaded: {first_line(error)}; {way_out}"
        ) from error
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    kept, expected = _weights(found), _weights(model)
    lost += [name for name in expected if kept.get(name) != expected[name]]
    if lost:
        names = sorted(set(lost))
        raise ConfigError(f"{told} at {len(names)} weights, as {names[0]}; {way_out}")
    if not model.is_custom_code():
        return
    for name, ours, theirs in _other_fields(model.config, found.config):
        raise ConfigError(
            f"{told}: its config.json would say {name} {theirs}, not {ours}; {way_out}"
        )
    if not off <= tolerance(model.dtype) * most:
        raise ConfigError(
            f"{told}: its logits would be off by {off:.1e}, the largest being {most:.1e}; {way_out}"
        )


def _no_room(asked: StudentConfig, error: Exception) -> StorageError:
    return StorageError(
        f"an export of {asked.model} is tried in {gettempdir()}, which does not take it: "
        f"{reason_of(error)}; free some space, or set TMPDIR to another folder"
    )


def _again(
    model: PreTrainedModel, folder: Path, asked: StudentConfig, kind: ModelKind
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model as it is after it has been saved in a folder and loaded from it, of transformers
    without values, and what was said of its weights."""
    place = {}
    if model.is_custom_code():
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # what its files cannot be written for
            raise _no_room(asked, error) from error
    else:
        _save_hollow(model, folder)
        place = {"device_map": {"": "meta"}}
    auto_model: Any = getattr(transformers, kind.auto_class)
    return auto_model.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=asked.trust_remote_code,
        output_loading_info=True,
        **place,
    )


def _other_fields(ours: Any, theirs: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields of a config, and of those in it, that are others in a second one, as JSON has them,
    with both values."""
    known, found = (
        {name: value for name, value in vars(config).items() if not name.startswith("_")}
        for config in (ours, theirs)
    )
    for name in sorted((known.keys() | found.keys()) - OF_THE_FILE):
        pair = known.get(name), found.get(name)
        if all(isinstance(value, PretrainedConfig) for value in pair):
            yield from _other_fields(*pair, at=f"{at}{name}.")
        elif _as_json(pair[0]) != _as_json(pair[1]):
            yield f"{at}{name}", *pair


def _as_json(value: Any) -> str:
    """A field as a file gives it back: tuples as lists, keys as strings."""
    written = json.loads(json.dumps(value, default=lambda other: type(other).__name__))
    return json.dumps(written, sort_keys=True)


def _difference(model: PreTrainedModel, other: Any) -> tuple[float, float]:
    """How far the logits of two models on a probe are from each other, and the largest of them."""
    ids_1T = probe_ids(model, length=16)
    with torch.no_grad(), evaluating(model), evaluating(other):
        expected, found = (
            each(input_ids=ids_1T.to(each.device)).logits.float().cpu() for each in (model, other)
        )
    return float((found - expected).abs().max()), float(expected.abs().max())


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

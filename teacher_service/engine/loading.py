"""Load a causal language model, or a classifier, from a folder or a hub, or refuse it with
one sentence."""

import json
import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from torch import nn
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.hub import cached_file

from shared.config.models.attention import INSTALLED_BY, Attention
from shared.errors import ConfigError
from shared.loading import (
    auto_class_of,
    first_line,
    head_of,
    read_config,
    stored_as,
    why_unloadable,
)
from shared.model_parts import not_finite, why_incomplete
from teacher_service.engine.tensor_parallel import meet, refuse_unsplittable

BLOCK_BYTES = 2**24
IDENTIFYING_FILES = ("*.safetensors", "config.json", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode and the folders its files lie in."""

    model: nn.Module
    folder: Path
    adapter_folder: Path | None
    commit: str | None  # of a hub model


def load_model(
    model: str,
    *,
    revision: str | None,
    adapter: str | None,
    adapter_revision: str | None,
    dtype: str,
    attention: Attention,
    quantisation: Literal["none", "int8", "nf4"],
    device: str,
    trust_remote_code: bool,
    tensor_parallel: int = 1,
) -> Loaded:
    """Load weights and adapter; only safetensors are read. With `tensor_parallel`, each process of
    the group that this one has joined holds a part, and all return together.

    Raises ConfigError for a folder without (all) weights, a missing adapter, a GPU that is not
    there, or a model that is not spread over so many processes.
    """
    _silence()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the teacher asks for a GPU and this process sees none; set gpus: 0")
    folder = local_folder(model, revision=revision, marker="config.json")
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if tensor_parallel > 1:
        arguments["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    else:
        arguments["device_map"] = _device_map(device)
    if quantisation != "none":
        arguments["quantization_config"] = _quantised(quantisation, getattr(torch, dtype))
    asked = {"revision": revision, "trust_remote_code": trust_remote_code}
    if tensor_parallel > 1:
        config = read_config(model, **asked, attention=attention)
        refuse_unsplittable(config, tensor_parallel, section="teachers.NAME", adapter=adapter)
    found = _loaded(model, asked, arguments, attention)
    if tensor_parallel > 1:
        meet()
    _skip_packed_kernel(found)
    adapter_folder = None
    if adapter is not None:
        adapter_folder = local_folder(
            adapter, revision=adapter_revision, marker="adapter_config.json"
        )
        found = with_adapter(found, adapter, adapter_revision).get_base_model()
    _refuse_not_finite(found, model if adapter is None else f"{model} with {adapter}")
    commit = getattr(found.config, "_commit_hash", None)
    return Loaded(found.eval(), folder, adapter_folder, commit)


def refuse_unloadable(
    model: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    attention: Attention,
    adapter: str | None = None,
    gpus: float = 0,
    tensor_parallel: int = 1,
    section: str = "teachers.NAME",
) -> None:
    """Raise ConfigError where the names and sizes of a model's weights, or those of the adapter on
    them in a local folder, are not those of its config, reading no values of the model, or where it
    is not spread over `tensor_parallel` processes. Of weights in few bits only their own quantiser
    knows the sizes, and whether what it needs is there is asked.
    """
    _silence()
    asked = {"revision": revision, "trust_remote_code": trust_remote_code}
    if attention in INSTALLED_BY:
        attention = "auto"  # needs the GPU of whoever loads the values
    config = read_config(model, **asked, attention=attention)
    if tensor_parallel > 1:
        refuse_unsplittable(config, tensor_parallel, section=section, adapter=adapter)
    if (stored := stored_as(config)) is not None:
        _refuse_unread(model, config, stored, on_gpu=gpus > 0, section=section)
        return
    found = _loaded(model, asked, {"device_map": {"": "meta"}}, attention, section=section)
    if adapter is not None:
        with_adapter(found, adapter, None)


def _refuse_unread(model: str, config: Any, stored: str, *, on_gpu: bool, section: str) -> None:
    """Raise ConfigError for weights in few bits that transformers, or what is installed beside it,
    does not read. What only a GPU tells is left to whoever loads them."""
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    named = f"{section}.model is {model}, which its config.json says is stored {stored}"
    try:
        known = AutoHfQuantizer.supports_quant_method(settings)
        if known:
            quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=True)
            quantiser.validate_environment(device_map={"": "cuda" if on_gpu else "cpu"})
    except Exception as error:
        if on_gpu and not isinstance(error, ImportError):
            return
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"{named}: {reason}; install what it needs, or name an unquantised model"
        ) from None
    if not known:
        raise ConfigError(
            f"{named}, which the installed transformers does not read; take quantization_config "
            "out of it if the weights are plain, or name another model"
        )


def local_folder(name: str, *, revision: str | None, marker: str) -> Path:
    """The folder that holds `marker`: the named one, or the hub's copy on this machine."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise ConfigError(f"the folder {name} has no {marker}; name a folder that has one")
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"the folder {name} has no weights (*.safetensors); name a folder written by "
                "save_pretrained"
            )
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"the folder {name} does not exist; check the path")
    try:
        return Path(str(cached_file(name, marker, revision=revision))).parent
    except OSError as error:
        raise ConfigError(
            f"{name} is neither a folder here nor a model that the hub gives: {first_line(error)}"
        ) from error


def weights_digest(folder: Path) -> str:
    """Hash over the content of the weights and configs of a folder, which a process reads once."""
    files = {path for pattern in IDENTIFYING_FILES for path in folder.glob(pattern)}
    found = ((path, path.stat()) for path in sorted(files))
    return _content_digest(tuple((path, told.st_size, told.st_mtime_ns) for path, told in found))


@lru_cache(maxsize=16)
def _content_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash over names and content of files; size and time say that they are as they were."""
    state = xxhash.xxh3_128()
    for path, _, _ in files:
        state.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                state.update(block)
    return state.hexdigest()


def merge_head(model: Any) -> None:
    """Fold an adapter on the head into a plain weight; a tied embedding keeps its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        model.set_output_embeddings(head.modules_to_save[head.active_adapters[0]])
    elif isinstance(head, BaseTunerLayer):
        plain: Any = head.get_base_layer()
        plain.weight = nn.Parameter(plain.weight.detach().clone())
        cast(Any, head).merge()
        model.set_output_embeddings(plain)


def with_adapter(model: Any, adapter: str, revision: str | None) -> Any:
    """A model with an adapter on its weights, as a `PeftModel`. Raises ConfigError."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of missing weights is asked for below
        try:
            wrapped = peft.PeftModel.from_pretrained(model, adapter, revision=revision)
            told = wrapped.load_adapter(adapter, "default", revision=revision)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of every library that reads one of its files
            raise ConfigError(
                f"the adapter {adapter} cannot be loaded: {_why_no_adapter(error)}"
            ) from error
    if told.missing_keys or told.unexpected_keys:
        lacks = "lacks weights for" if told.missing_keys else "has weights beyond its config, as"
        name = sorted(told.missing_keys or told.unexpected_keys)[0]
        raise ConfigError(
            f"the adapter {adapter} {lacks} {name.removeprefix('base_model.model.')}; name the "
            "base that it was trained on, and get the whole folder"
        )
    if not isinstance(wrapped.base_model, BaseTuner):
        raise ConfigError(
            f"the adapter {adapter} adds prompt tokens; only adapters on weights are supported"
        )
    return wrapped


def _why_no_adapter(error: Exception) -> str:
    """Why an adapter cannot be loaded, in our words where they say more."""
    reason = first_line(error)
    if "size mismatch" in str(error):
        return "its weights do not fit this model; name the base that it was trained on"
    if "not found in the base model" in reason:
        return f"{reason.partition('. ')[0]}; name the base that it was trained on"
    if isinstance(error, json.JSONDecodeError):
        return f"its adapter_config.json is not valid JSON ({reason}); get it again"
    if isinstance(error, KeyError):
        return f"its adapter_config.json names {reason}, which the installed peft does not know"
    if isinstance(error, SafetensorError):
        return f"its adapter_model.safetensors is damaged or cut off ({reason}); get it again"
    return reason


def _loaded(
    model: str,
    asked: dict[str, Any],
    arguments: dict[str, Any],
    attention: Attention,
    *,
    section: str = "teachers.NAME",
) -> Any:
    """A model with all its weights, of the revision and trust that are asked for. Raises
    ConfigError."""
    options = {"use_safetensors": True, "output_loading_info": True}
    try:
        config = read_config(model, **asked, attention=attention)
        auto_model: Any = getattr(transformers, auto_class_of(config))
        if (head := head_of(config)) is not None:
            auto_model = getattr(transformers, f"AutoModel{head}")
        found, info = auto_model.from_pretrained(
            model, config=config, **asked, **arguments, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a model's own code and of every library it needs
        reason = why_unloadable(error, section=section, attention=attention)
        raise ConfigError(f"the teacher {model} cannot be loaded: {reason}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"the teacher {model} lacks weights for {missing}; get the whole folder")
    if stored_as(config) is None and (why := why_incomplete(found, info["unexpected_keys"])):
        raise ConfigError(f"the teacher {model} cannot be loaded: {why}")
    return found


def _refuse_not_finite(model: Any, name: str) -> None:
    """Raise ConfigError for a weight that is NaN or infinite, as after a damaged save."""
    if (weight := not_finite(model)) is not None:
        raise ConfigError(
            f"the teacher {name} has values in {weight} that are not finite in "
            f"{str(model.dtype)[6:]}; get its files again"
        )


def _quantised(quantisation: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if quantisation == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _skip_packed_kernel(model: nn.Module) -> None:
    """bitsandbytes packs 4-bit weights for AVX512 in blocks of 32 x 64 and fails on others."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        fits = layer.out_features % 32 == 0 and layer.in_features % 64 == 0
        layer.support_avx512bf16_for_cpu &= fits


def _device_map(device: str) -> str | dict[str, str]:
    """One device, or all GPUs of the replica, layer by layer, where it has several."""
    several = device == "cuda" and torch.cuda.device_count() > 1
    return "auto" if several else {"": device}


def _silence() -> None:
    """bitsandbytes warns once per product on CPU; transformers draws a bar per file."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

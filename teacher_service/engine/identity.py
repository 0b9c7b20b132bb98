"""What names a model in an engine's fingerprint, whatever computes it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from shared.loading import stored_as
from shared.text.tokenizers import identify
from teacher_service.engine.loading import Loaded, weights_digest
from teacher_service.engine.tensor_parallel import leads


def name_of(model: str) -> str:
    """Folders by their last part, so that a moved folder stays the same teacher."""
    folder = Path(model).expanduser()
    return folder.name if folder.is_dir() else model


def tokenizer_digest(model: str, revision: str | None, *, trusted: bool) -> str:
    """Identity of the tokenizer in the teacher's folder, empty where it has none."""
    asked = {"revision": revision, "trust_remote_code": trusted}
    try:
        return identify(transformers.AutoTokenizer.from_pretrained(model, **asked)).digest
    except Exception:  # of every tokenizer's own code; a run has read it before
        return ""


def stored_fact(config: Any) -> dict[str, str]:
    """What a fingerprint says of weights that are not quantised when they are loaded, and lie in
    few bits in their folder: how. Nothing of others."""
    found = stored_as(config)
    return {} if found is None else {"stored": found}


def loaded_fingerprint(loaded: Loaded, device: str) -> dict[str, str]:
    """What a loaded model adds to what names it: its files and the machine that computes."""
    return _weights(loaded) | _machine(loaded, device)


def _weights(loaded: Loaded) -> dict[str, str]:
    """Digests of all files, which of a group one process reads."""
    if not leads(loaded.model):
        return {}
    adapter = loaded.adapter_folder
    return {
        "weights": weights_digest(loaded.folder),
        "adapter_weights": weights_digest(adapter) if adapter else "",
    }


def _machine(loaded: Loaded, device: str) -> dict[str, str]:
    """What decides the last bits of an answer besides weights and rows."""
    if device == "cuda":
        kind = torch.cuda.get_device_name()
    else:
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    if loaded.adapter_folder is not None:
        versions += f" peft {version('peft')}"
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        versions += f" bitsandbytes {version('bitsandbytes')}"
    return {
        "engine": versions,
        "device": kind,
        "attention": str(getattr(loaded.model.config, "_attn_implementation", "")),
        "threads": str(torch.get_num_threads()),
    }

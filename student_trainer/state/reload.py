"""Load an exported folder as its users will and compare its logits; run as a script.

    python -I reload.py < QUESTION

Runs in a process of its own with transformers and peft alone, which may be started before there is
a question: imports come first. QUESTION is JSON: folder, probe and settings, which are auto_class,
base, revision, dtype, quantisation, trust_remote_code and num_labels, which is 0 of a language
model. Prints JSON: the largest difference from the probe's logits, relative to the largest logit.

T tokens   V vocabulary, or classes
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

PIXELS = "pixels."
OURS = {"shared", "student_trainer", "teacher_service", "cluster"}


def load_bag(folder: Path) -> torch.nn.Module | None:
    """The network of `student_trainer/models/bag.py`, with torch and safetensors alone; None where
    a folder holds another model."""
    if json.loads((folder / "config.json").read_text()).get("model_type") != "tutelage_bag":
        return None
    w = load_file(folder / "model.safetensors")
    rows = len(w["embedding.weight"])

    class Bag(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            states = w["embedding.weight"][input_ids * 2_654_435_761 % 2**32 * rows // 2**32]
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            inner = torch.relu(mean @ w["hidden.weight"].T + w["hidden.bias"])
            return SimpleNamespace(logits=inner @ w["classifier.weight"].T + w["classifier.bias"])

    return Bag()


def load(folder: Path, settings: dict) -> "PreTrainedModel | PeftModel | torch.nn.Module":
    """The exported model: whole, or an adapter on its base."""
    dtype = getattr(torch, settings["dtype"])
    options = {"dtype": dtype, "trust_remote_code": settings["trust_remote_code"]}
    options |= {"return_dict": True}  # an adapter's base may say otherwise
    if settings["num_labels"]:
        options["num_labels"] = settings["num_labels"]
    if settings["quantisation"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if settings["base"] is None and (bag := load_bag(folder)) is not None:
        return bag
    auto_model = getattr(transformers, settings["auto_class"])
    if settings["base"] is None:
        return auto_model.from_pretrained(folder, **options)
    from peft import PeftModel  # slow, and only adapters need it

    revision = settings["revision"] or "main"
    base = auto_model.from_pretrained(settings["base"], revision=revision, **options)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # training's kernel, for equal logits
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return PeftModel.from_pretrained(base, str(folder))


def pixels_in(probe: Mapping, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a probe's model reads beside ids."""
    found = {n[len(PIXELS) :]: torch.from_numpy(probe[n]) for n in probe if n.startswith(PIXELS)}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}


def answer(question: dict) -> dict:
    """How far the exported model's logits, [T, V] or those of the classes [1, V] or
    [1, T, V], are from the probe's, and what of ours ran."""
    folder, expected = question["folder"], np.load(question["probe"])
    settings = question["settings"]
    sees = settings["auto_class"] == "AutoModelForImageTextToText"
    reader = AutoProcessor if sees else AutoTokenizer
    reader.from_pretrained(folder, trust_remote_code=settings["trust_remote_code"])
    model = load(Path(folder), settings).eval()
    with torch.no_grad():
        ids = torch.from_numpy(expected["ids"])[None]
        pixels = pixels_in(expected, model)
        if settings["num_labels"]:
            logits = model(input_ids=ids).logits
        else:
            logits = model(input_ids=ids, use_cache=False, **pixels).logits[0]  # as in training
    difference = np.abs(logits.float().numpy() - expected["logits"]).max()
    ours = sorted(OURS & {name.partition(".")[0] for name in sys.modules})
    largest = np.abs(expected["logits"]).max()
    return {"difference": float(difference / largest), "ours": ours}


def main() -> None:
    """Print the answer to the question that comes in."""
    if asked := sys.stdin.readline():  # else who started this is gone
        print(json.dumps(answer(json.loads(asked))))


if __name__ == "__main__":
    main()

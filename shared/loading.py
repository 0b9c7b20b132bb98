"""Loading models of another library: what it must be told, and why it could not, for sentences of
ours."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.config.models.attention import Attention, attend

# What a config may say of a model's outputs changes their form, and attention kernels that give no
# weights refuse to; ours are always plain.
MERGED = "merged_from.json"  # beside weights that an adapter was merged into
EXPORTED = "tutelage.json"  # beside the weights of an export
UPCYCLED = "upcycled_from.json"  # beside weights of experts that were a dense model's FFNs
OF_TEXTS, OF_WORDS = "ForSequenceClassification", "ForTokenClassification"  # names of heads
STORED_IN_INT8 = "in 8 bits by bitsandbytes"  # as `stored_as` says it
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def read_config(
    model: str, *, revision: str | None, trust_remote_code: bool, attention: Attention
) -> Any:
    """A model's config of transformers, with plain outputs and the attention that is asked for,
    whatever its file says of them, and without special tokens of negative ids."""
    from transformers import AutoConfig  # slow

    asked = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    told = {} if attention == "auto" else {"attn_implementation": attention}
    config = AutoConfig.from_pretrained(model, **asked, **told, **PLAIN_OUTPUTS)
    attend(config, attention)
    for part in (config, config.get_text_config()):
        for name in SPECIAL_IDS:
            if (found := getattr(part, name, None)) is not None:
                setattr(part, name, without_negative(found))
    return config


def head_of(config: Any) -> str | None:
    """By which head a model of transformers tells classes apart, of whole texts or of words; None
    where it is no classifier."""
    kinds = getattr(config, "architectures", None) or ()
    heads = (OF_TEXTS, OF_WORDS)
    return next((head for head in heads if any(kind.endswith(head) for kind in kinds)), None)


def classes_of(config: Any) -> tuple[str, ...] | None:
    """The classes that a model of transformers has a head for, in the order of its outputs; None
    where it is no classifier."""
    if head_of(config) is None:
        return None
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def is_classifier(model: str, *, revision: str | None, trust_remote_code: bool) -> bool:
    """Whether a model's config, where it can be read, says that it is a classifier."""
    try:
        asked = {"revision": revision, "trust_remote_code": trust_remote_code}
        return classes_of(read_config(model, **asked, attention="auto")) is not None
    except Exception:  # loading it says why
        return False


def auto_class_of(config: Any) -> str:
    """The class of transformers that loads a causal language model of a config, alone or beside
    what sees images."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "AutoModelForImageTextToText" if sees and not causal else "AutoModelForCausalLM"


def is_bag(model: str) -> bool:
    """Whether a model is the small network that transformers alone does not know."""
    path = Path(model) / "config.json"
    return path.exists() and json.loads(path.read_text()).get("model_type") == "tutelage_bag"


def without_negative(ids: Any) -> Any:
    """An id of a special token, or a list of them, without negative ones, by which some say that
    there is none; what is no number stays. torch would count them from the end."""
    if isinstance(ids, list):
        return [each for each in ids if without_negative(each) is not None] or None
    return None if isinstance(ids, int) and ids < 0 else ids


def merged_of(folder: Path) -> tuple[str, str] | None:
    """The adapter and the base, as they were named, whose merged weights a folder holds; None for
    any other folder."""
    path = folder / MERGED
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    return told["adapter"], told["base"]


def upcycled_of(folder: Path) -> dict[str, Any] | None:
    """What a folder of upcycled weights was made from: model, revision, every, experts, top_k;
    None for any other folder."""
    path = folder / UPCYCLED
    return json.loads(path.read_text()) if path.exists() else None


def keep_upcycling(folder: Path, base: Path) -> None:
    """Let a folder with the weights of a mixture say what it was upcycled from, as the folder it
    began with does, where that was; a dense model on disk is called by its name alone."""
    found = upcycled_of(base)
    if found is not None:
        named = found | {"model": called(found["model"])}
        (folder / UPCYCLED).write_text(json.dumps(named))


def called(model: str) -> str:
    """A hub name as it is, an export by its run's, another folder by its own: where it lay on disk
    is nobody's business."""
    facts = Path(model) / EXPORTED
    if facts.exists():
        return json.loads(facts.read_text())["run"]
    return Path(model).name if Path(model).is_absolute() or Path(model).is_dir() else model


def first_line(error: BaseException) -> str:
    """The first line of a foreign error, with the one that it announces, for a sentence of ours."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def untrusted(error: BaseException, *, trust: str) -> str | None:
    """Which option of ours lets a model's own code run, `trust`, where a library's error is that it
    may not; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        "it comes with code of its own, which runs only where the config trusts it; read that "
        f"code, then set {trust}=true"
    )


def why_unloadable(error: BaseException, *, section: str, attention: str) -> str:
    """Why weights cannot be loaded, in our words where the way out is one of ours; `section` is
    where the config asks for the model, `attention` the one asked for."""
    reason = first_line(error)
    unknown = "its config.json names {}, which the installed transformers does not know"
    if (said := untrusted(error, trust=f"{section}.trust_remote_code")) is not None:
        return said
    if "ignore_mismatched_sizes" in str(error):
        return "its weights do not have the sizes of its config.json; get both from one model"
    if reason.startswith("Unrecognized configuration class"):
        kind = re.search(r"\.(\w+)'>", reason)
        named = f", {kind[1].removesuffix('Config')}," if kind else ""
        return (
            f"its architecture{named} is none of transformers' causal language models; name "
            "another model"
        )
    if "padding_idx" in reason.lower():
        return (
            "pad_token_id in its config.json is no row of its embedding; set it to null there, or "
            "to the tokenizer's own"
        )
    if type(error).__name__ == "SafetensorError":
        return f"one of its .safetensors files is damaged or cut off ({reason}); get it again"
    if isinstance(error, json.JSONDecodeError):
        return f"one of its .json files is not valid JSON ({reason}); get it again"
    if isinstance(error, AttributeError) and getattr(error.obj, "__name__", "") == "torch":
        return unknown.format(repr(error.name))  # a dtype
    if isinstance(error, KeyError):
        return unknown.format(reason)
    asked_otherwise = attention != "auto" and "ttention" in reason
    if asked_otherwise or "attn_implementation" in str(error) or "FlashAttention" in reason:
        other = "auto" if attention != "auto" else "eager, since its config.json asks for another"
        return f"{reason.split('. ')[0].rstrip('.')}; set {section}.attention={other}"
    return reason


def in_int8(fingerprint: Mapping[str, str]) -> bool:
    """Whether a teacher multiplies in the eight bits of bitsandbytes, as asked or as its weights
    are stored, so that a row's product depends on all that is multiplied at once."""
    return fingerprint.get("quantisation") == "int8" or fingerprint.get("stored") == STORED_IN_INT8


def in_few_bits(fingerprint: Mapping[str, str]) -> bool:
    """Whether a teacher's weights are quantised, as asked or as they are stored."""
    return fingerprint.get("quantisation", "none") != "none" or "stored" in fingerprint


def stored_as(config: Any) -> str | None:
    """In words, how a config of transformers says that the weights are stored, None: plainly."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method") or "an unnamed method"
    method = getattr(method, "value", method)
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else None)
    bits = bits or (8 if settings.get("load_in_8bit") else None)
    return f"in {bits} bits by {method}" if bits else f"quantised by {method}"

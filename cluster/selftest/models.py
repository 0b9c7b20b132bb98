"""A tiny random pair, its tokenizer and two domains of this Python's own text, made in a second."""

import inspect
import json
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.builtin.models import train_tokenizer
from shared.config.file import resolve
from shared.config.run import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB, CONTEXT = 512, 128
DOCUMENTS, CHARACTERS = 40, 400  # of each domain, and of a document
SIZES = {"teacher": (48, 3), "student": (32, 2)}  # width and layers


def tiny_config(folder: Path) -> Config:
    """A resolved config of a run on random models, all of it below `folder`."""
    import transformers

    texts = {"code": inspect.getsource(inspect), "prose": "".join(_topics())}
    for name, text in texts.items():
        starts = range(0, DOCUMENTS * CHARACTERS, CHARACTERS)
        lines = (json.dumps({"text": text[start : start + CHARACTERS]}) for start in starts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer((text[:50_000] for text in texts.values()), vocab=VOCAB)
    for seed, (name, (width, layers)) in enumerate(SIZES.items()):
        save_model(folder / name, tokenizer, width=width, layers=layers, seed=seed)
    described = {
        "name": "selftest",
        "steps": 1,
        "paths": {"root": str(folder), "runs": str(folder), "cache": str(folder / "cache")},
        "teachers": {"teacher": {"model": "teacher", "cpus": 0.5}},
        "student": {"model": "student", "cpus": 0.5},
        "domains": {name: {"train": f"{name}.jsonl"} for name in texts},
        "data": {"context": CONTEXT, "validation_rows": 4},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
    }
    return resolve(Config.model_validate(described))


def _topics() -> Iterable[str]:
    return pydoc_data.topics.topics.values()


def save_model(
    folder: Path,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    width: int,
    layers: int,
    tied: bool = True,
    seed: int = 0,
) -> None:
    """Save a random Llama with the tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""A tiny random pair, its tokenizer and two domains of this Python's own text, made in a second."""

import inspect
import json
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.config_file import resolve

VOCAB = 512
DOCUMENTS, CHARACTERS = 40, 400  # of each domain, and of a document
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")  # ids 0, 1, 2
SIZES = {"teacher": (48, 3), "student": (32, 2)}  # width and layers


def tiny_config(folder: Path) -> Config:
    """A resolved config of a run on random models, all of it below `folder`."""
    texts = {"code": inspect.getsource(inspect), "prose": "".join(_topics())}
    for name, text in texts.items():
        starts = range(0, DOCUMENTS * CHARACTERS, CHARACTERS)
        lines = (json.dumps({"text": text[start : start + CHARACTERS]}) for start in starts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for seed, (name, (width, layers)) in enumerate(SIZES.items()):
        _save_model(folder / name, width=width, layers=layers, seed=seed)
        _save_tokenizer(folder / name, texts.values())
    described = {
        "name": "selftest",
        "steps": 1,
        "paths": {"root": str(folder), "runs": str(folder), "cache": str(folder / "cache")},
        "teachers": {"teacher": {"model": "teacher", "cpus": 0.5}},
        "student": {"model": "student", "cpus": 0.5},
        "domains": {name: {"train": f"{name}.jsonl"} for name in texts},
        "data": {"context": 128, "validation_rows": 4},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
    }
    return resolve(Config.model_validate(described))


def _topics() -> Iterable[str]:
    return pydoc_data.topics.topics.values()


def _save_model(folder: Path, *, width: int, layers: int, seed: int) -> None:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _save_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:50_000] for text in texts), trainer)
    pad, bos, eos = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    ).save_pretrained(folder)

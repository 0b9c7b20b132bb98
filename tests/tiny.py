"""Tiny real models: a byte-level BPE tokenizer of 512 tokens and random Llamas around it."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 512


@dataclass(frozen=True)
class Pair:
    """Folders of a teacher and a student."""

    teacher: Path
    student: Path


def save_tokenizer(folder: Path) -> None:
    """Train a tokenizer on this interpreter's own sources and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(inspect)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        model_max_length=128,
    ).save_pretrained(folder)


def save_model(folder: Path, *, width: int, layers: int, tied: bool = True, seed: int = 0) -> None:
    """Save a random Llama with the tokenizer beside it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_pair(folder: Path, *, tied: bool = True) -> Pair:
    """A teacher of width 48 and 3 layers, a student of width 32 and 2 layers."""
    pair = Pair(folder / "teacher", folder / "student")
    save_model(pair.teacher, width=48, layers=3, tied=tied, seed=1)
    save_model(pair.student, width=32, layers=2, tied=tied, seed=2)
    return pair

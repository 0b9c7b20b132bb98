"""Tiny real models: a byte-level BPE tokenizer of 512 tokens and random Llamas around it."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from cluster.builtin.models import train_tokenizer
from cluster.selftest import models

VOCAB = models.VOCAB


@dataclass(frozen=True)
class Pair:
    """Folders of a teacher and a student."""

    teacher: Path
    student: Path


def save_tokenizer(folder: Path) -> None:
    """Train a tokenizer on this interpreter's own sources and save it."""
    tokenizer().save_pretrained(folder)


def save_model(folder: Path, *, width: int, layers: int, tied: bool = True, seed: int = 0) -> None:
    """Save a random Llama with the tokenizer beside it."""
    models.save_model(folder, tokenizer(), width=width, layers=layers, tied=tied, seed=seed)


def tokenizer() -> PreTrainedTokenizerFast:
    text = inspect.getsource(inspect)
    return train_tokenizer([text], vocab=VOCAB, model_max_length=models.CONTEXT)


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a saved model's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_pair(folder: Path, *, tied: bool = True) -> Pair:
    """A teacher of width 48 and 3 layers, a student of width 32 and 2 layers."""
    pair = Pair(folder / "teacher", folder / "student")
    save_model(pair.teacher, width=48, layers=3, tied=tied, seed=1)
    save_model(pair.student, width=32, layers=2, tied=tied, seed=2)
    return pair

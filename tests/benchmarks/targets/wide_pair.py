"""A teacher and a student with as large a vocabulary as the reference text bears.

A byte-level BPE tokenizer learns 65,536 ids from the training text of all domains, 17 million
characters, and two small Llamas learn that text: ten minutes of one core. The folder they are
made in keeps them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from cluster.builtin.models import end_to_end, train_tokenizer
from cluster.builtin.plans import ModelPlan
from cluster.builtin.training import train_model

ASKED = 2**16  # ids; the trainer stops earlier where no pair is left to merge
DOMAINS = ("cli", "code", "instruct", "intent", "law", "math", "medicine", "ner", "sql", "stories")
PLANS = {
    "teacher": ModelPlan(
        width=128, layers=2, heads=4, domains=DOMAINS, steps=400, rows_per_step=4, context=128
    ),
    "student": ModelPlan(
        width=64, layers=2, heads=2, domains=DOMAINS, steps=100, rows_per_step=4, context=128
    ),
}


def wide_pair(reference: Path, folder: Path) -> dict[str, Path]:
    """The folders of both models, with their tokenizer; made where they are missing."""
    paths = {name: folder / f"{name}-{_key(plan)}" for name, plan in PLANS.items()}
    if not all(path.is_dir() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(texts(reference), vocab=ASKED)
        tokens = [end_to_end(tokenizer, texts(reference, domain)) for domain in DOMAINS]
        for name, plan in PLANS.items():
            _save(paths[name], plan, tokenizer, tokens)
    return paths


def _key(plan: ModelPlan) -> str:
    return hashlib.sha256(repr((plan, ASKED)).encode()).hexdigest()[:8]


def texts(reference: Path, *domains: str) -> Iterator[str]:
    """The training documents of domains, of all of them if none is named."""
    for domain in domains or DOMAINS:
        for path in sorted((reference / "data" / domain).glob("*.train.jsonl")):
            with path.open(encoding="utf-8") as file:
                for row in map(json.loads, file):
                    yield row.get("text") or f"{row['prompt']}\n{row['response']}"


def _save(
    target: Path, plan: ModelPlan, tokenizer: PreTrainedTokenizerFast, tokens: list[np.ndarray]
) -> None:
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    training = target.with_name(f"{target.name}.training")
    model = train_model(plan, tokens, vocab=len(tokenizer), title=target.name, folder=training)
    model.save_pretrained(scratch)
    tokenizer.model_max_length = plan.max_length
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)

"""What cells read that lies in no reference folder: prompts, and a student that knows nothing."""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shared.config.run import Config
from shared.prompts.prompts import Example, Prompt, PromptSet
from shared.run.run_dir import write_atomically
from shared.text.documents import Document
from shared.text.framing import Tokenizer, encode
from shared.text.sources import read_documents, sources_of

CHOICE = 200  # documents looked at
LEAST_TOKENS = 32
TASK_ROWS, HELD_OUT = 6000, 200
LETTERS = "abcdefghij"


def write_examples(to: Path, config: Config) -> None:
    """Prompts for the teacher: one worked example of each domain of a resolved config."""
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    found = {name: Prompt("", (_short(name, config, tokenizer),)) for name in config.domains}
    write_atomically(to, json.dumps(PromptSet(found).to_dict(), indent=1))


def write_random(to: Path, *, like: Path) -> None:
    """A student of the same shape that knows nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like))
    model.to(torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(like).save_pretrained(to)


def write_tasks(to: Path) -> None:
    """Rows of two tasks with right answers: letters in the other order, and sums of two numbers
    digit by digit. No validation row is a training row."""
    draws = random.Random(0)
    to.mkdir(parents=True, exist_ok=True)
    for name, row in (("reverse", _reversed), ("add", _added)):
        rows = {row["prompt"]: row for row in (row(draws) for _ in range(TASK_ROWS))}
        lines = [json.dumps(row) for row in rows.values()]
        parts = {"validation": lines[:HELD_OUT], "train": lines[HELD_OUT:]}
        for part, own in parts.items():
            write_atomically(to / f"{name}.{part}.jsonl", "\n".join(own))


def _reversed(draws: random.Random) -> dict[str, str]:
    letters = draws.choices(LETTERS, k=draws.randint(3, 6))
    return {"prompt": f"reverse {' '.join(letters)}", "response": " ".join(letters[::-1])}


def _added(draws: random.Random) -> dict[str, str]:
    one, two = (draws.randint(0, 99) for _ in range(2))
    asked = f"add {' '.join(f'{one:02}')} and {' '.join(f'{two:02}')}"
    return {"prompt": asked, "response": " ".join(str(one + two))}


def _short(name: str, config: Config, tokenizer: Tokenizer) -> Example:
    """The shortest of a domain's first training documents that is not trivial."""
    documents = list(islice(_documents(name, config), CHOICE))
    encoded = encode(iter(documents), tokenizer=tokenizer, loss_on="everything")
    lengths = [len(one.input_ids) for one in encoded]
    usable = [n for n, length in enumerate(lengths) if length >= LEAST_TOKENS]
    document = documents[min(usable, key=lambda n: lengths[n])]
    if document.kind == "pair":
        return Example(document.prompt, document.response)
    return Example("", document.text)


def _documents(name: str, config: Config) -> Iterator[Document]:
    domain = config.domains[name]
    sources = sources_of(domain, "train")
    return read_documents(sources, root=Path(config.paths.root), columns=domain.columns)

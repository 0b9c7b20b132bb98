"""What cells read that lies in no reference folder: prompts, and a student that knows nothing."""

import json
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

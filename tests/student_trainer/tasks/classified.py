"""Small real runs of a task that classifies: texts of three classes in two domains, a causal
teacher and sequence classifiers."""

import inspect
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
)

from cluster.planning.preparation import prepare_run, run_plan
from cluster.planning.tasks.classes import with_classes
from cluster.planning.tasks.tiny import with_tiny
from shared.config.run import Config
from shared.run.plan import RunPlan
from tests import tiny

LABELS = ("ask", "ask again", "tell")  # the first is how the second begins
WORDS = ("import", "def", "return", "class", "self", "name", "value", "list", "if", "not")
DOMAINS = ("code", "prose")
TEMPLATE = "Text: {text} Kind:"


def word_pieces(folder: Path) -> Any:
    """A lower-cased tokenizer of BERT's kind, [CLS] text [SEP]."""
    text = inspect.getsource(inspect).lower()
    pieces = sorted({*re.findall(r"[a-z]+", text), *(f"##{c}" for c in text if c.isalnum())})
    letters = sorted({c for c in text if not c.isspace()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = list(dict.fromkeys([*special, *letters, *pieces]))[: tiny.VOCAB]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))


def save_bert(folder: Path, *, own_tokenizer: bool = False) -> None:
    """A tiny BERT without a head, around the tiny tokenizer or one of its own, without dropout."""
    folder.mkdir(parents=True)
    teacher = AutoTokenizer.from_pretrained(folder.parent / "teacher")
    tokenizer = word_pieces(folder) if own_tokenizer else teacher
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_classifier(folder: Path, base: Path, labels: Sequence[str]) -> None:
    """A sequence classifier on a base, that tells texts apart by their words."""
    torch.manual_seed(11)
    options = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    model = AutoModelForSequenceClassification.from_pretrained(base, **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.no_grad():
        for weight in model.parameters():  # larger ones, so that the words decide
            if weight.ndim > 1:
                weight.mul_(8)
        head.weight.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows_of(seed: int, *, count: int) -> list[dict[str, str]]:
    """Texts of a few words, each of a class."""
    draw = random.Random(seed)
    return [
        {
            "text": " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + f" {seed}.{n}",
            "label": LABELS[n % len(LABELS)],
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_models(folder: Path) -> None:
    """A pair of Llamas, a BERT of their tokenizer, and one of its own."""
    tiny.save_pair(folder)
    save_bert(folder / "bert")
    save_bert(folder / "own", own_tokenizer=True)


def config_of(folder: Path, name: str, *, models: Path, **options: Any) -> Config:
    """The config of a short run; options are sections or leaves of the config, merged."""
    domains = {}
    for seed, domain in enumerate(DOMAINS):
        paths = {part: folder / "text" / f"{domain}.{part}.jsonl" for part in ("train", "valid")}
        write_rows(paths["train"], rows_of(seed, count=12))
        write_rows(paths["valid"], rows_of(seed + 10, count=7))
        domains[domain] = {"train": str(paths["train"]), "validation": str(paths["valid"])}
    fields: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "steps": 4,
        "log_every": 1,
        "paths": {"runs": str(folder), "cache": str(folder / "cache")},
        "task": {"kind": "classification", "template": TEMPLATE},
        "teachers": {"t": {"model": str(models / "teacher")}},
        "student": {"model": str(models / "bert"), "workers": 2},
        "domains": domains,
        "data": {"context": 48},
        "batch": {"rows_per_step": 8, "micro_batch": 2},
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimiser": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.01},
        "checkpoints": {"every": 2},
    }
    for option, value in options.items():
        old = fields.get(option)
        merges = isinstance(value, dict) and isinstance(old, dict) and option != "domains"
        fields[option] = {**old, **value} if merges else value
    return with_tiny(with_classes(Config.model_validate(fields)))


def plan_of(config: Config) -> RunPlan:
    """The plan of a config, prepared as a run prepares it."""
    folder = Path(config.paths.runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    return run_plan(prepare_run(config), run_dir=folder, teacher={"model": "t"})


def class_logprobs(folder: str | Path, prompt: str, labels: tuple[str, ...] = LABELS) -> Any:
    """What a causal model says of classes and their ends after a prompt, float64 [C], each read by
    itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    bos, found = tokenizer.bos_token_id, []
    ids = [bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    for label in labels:
        own = [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logp_TV = model(torch.tensor([[*ids, *own]])).logits[0].log_softmax(-1)
        found.append(sum(logp_TV[len(ids) - 1 + n, token] for n, token in enumerate(own)))
    return torch.stack(found)


def classifier(config: Config) -> Any:
    """The student of a config as transformers makes it, in float64, without our code."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.student.model, num_labels=len(LABELS), dtype=torch.float32
    )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = AutoTokenizer.from_pretrained(config.student.model).pad_token_id
    return model.double().eval()

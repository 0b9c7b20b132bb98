"""What teacher and students wrote when they were evaluated, as the page shows it side by side."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PER_DOMAIN = 3  # of what the run's folder has
MOST_CHARS = 1500  # of a text
TITLES = {"teacher": "teacher", "before": "student before", "after": "student after"}


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a sample."""

    title: str
    text: str
    notes: tuple[str, ...] = ()  # its scores, and whether it is whole


@dataclass(frozen=True, slots=True)
class Sample:
    """An opening, what is right to follow, and what each model wrote."""

    prompt: str
    texts: tuple[Text, ...]


def samples_of(path: Path, domains: tuple[str, ...]) -> dict[str, list[Sample]]:
    """The first samples of each domain, in the order of `domains`; empty without a file, and
    without lines that cannot be read."""
    found: dict[str, list[Sample]] = {name: [] for name in domains}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        domain, sample = _read(line)
        if sample and len(found.get(domain, [None] * PER_DOMAIN)) < PER_DOMAIN:
            found[domain].append(sample)
    return {name: samples for name, samples in found.items() if samples}


def _read(line: bytes) -> tuple[str, Sample | None]:
    """The domain of a line and its sample; none of one that is empty or damaged."""
    try:
        told = json.loads(line)
        return told["domain"], _sample(told)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", None


def _sample(told: Mapping[str, Any]) -> Sample:
    is_scored = any(written["scores"] for written in told["models"].values())
    texts = [Text("right" if is_scored else "the text goes on", _end(told["right"]))]
    for name, written in told["models"].items():
        at = f", step {told['step']}" if name == "after" and told["step"] is not None else ""
        title = f"{TITLES.get(name, name)}{at}"
        texts.append(Text(title, _end(written["text"]), tuple(_notes(written))))
    prompt = told["prompt"]
    return Sample(f"… {prompt[-MOST_CHARS:]}" if len(prompt) > MOST_CHARS else prompt, tuple(texts))


def _end(text: str) -> str:
    return f"{text[:MOST_CHARS]} …" if len(text) > MOST_CHARS else text


def _notes(written: Mapping[str, Any]) -> list[str]:
    scores, notes = written["scores"], []
    if scores:
        notes.append("exact match" if scores["exact_match"] else f"F1 {scores['token_f1']:.2f}")
        if scores["rouge_l"] is not None and not scores["exact_match"]:
            notes.append(f"Rouge-L {scores['rouge_l']:.2f}")
        if written["cut"]:
            notes.append("cut")
    return notes

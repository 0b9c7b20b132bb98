"""A small complete job on tiny models, as a user would write it."""

import random
from pathlib import Path

import yaml

from tests.tiny import Pair

WORDS = {
    "letters": ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
}


def two_teachers(pair: Pair) -> dict[str, object]:
    """Parts of a job whose domains have a teacher each; the second computes otherwise."""
    one = {"model": str(pair.teacher), "cpus": 0.5}
    taught = dict(zip(WORDS, ("one", "two"), strict=True))
    return {
        "teachers": {"one": one, "two": one | {"dtype": "bfloat16"}},
        "domains": {name: {"train": f"{name}.jsonl", "teacher": t} for name, t in taught.items()},
    }


def with_all_that_is_exported(pair: Pair) -> dict[str, object]:
    """Parts of a job that set every metric of a run: a store, a weighting and experts."""
    mixture = {"every": 1, "experts": 2, "top_k": 1, "train": "all"}
    return {
        "targets": {"store": "store"},
        "weighting": {"policy": "instance_weights", "centre": "mean"},
        "student": {"model": str(pair.student), "cpus": 0.5, "zero": 0, "upcycle": mixture},
    }


def write_job(folder: Path, pair: Pair, *, documents: int = 60, **parts: object) -> Path:
    """Text of two domains and a config beside it; `parts` replace top-level options."""
    for name, words in WORDS.items():
        draw = random.Random(name)
        rows = (" ".join(draw.choices(words, k=60)) for _ in range(documents))
        text = "".join(f'{{"text": "{row}"}}\n' for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    job = {
        "name": "job",
        "steps": 6,
        "log_every": 2,
        "paths": {
            "root": str(folder),
            "runs": str(folder / "runs"),
            "cache": str(folder / "cache"),
        },
        "teachers": {"tiny": {"model": str(pair.teacher), "cpus": 0.5}},
        "student": {"model": str(pair.student), "cpus": 0.5, "zero": 0},
        "domains": {name: {"train": f"{name}.jsonl"} for name in WORDS},
        "data": {"context": 64, "validation_rows": 4},
        "batch": {"rows_per_step": 4, "micro_batch": 2},
        "optimiser": {"lr": 3e-3},
        "mixture": {"policy": "ddk", "interval": 2, "lag_steps": 1},
        "checkpoints": {"every": 3},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | parts, sort_keys=False))
    return path

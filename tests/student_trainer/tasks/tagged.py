"""Small real runs of a task that tags: texts of two types of entities, a causal teacher and token
classifiers."""

import random
from pathlib import Path
from typing import Any

from cluster.planning.tasks.classes import with_classes
from shared.config.run import Config
from tests.student_trainer.tasks import classified

TAGS = ("O", "B-kind", "I-kind", "B-place", "I-place")
NAMES = {"kind": ("list", "class name"), "place": ("value", "import self")}
PLAIN = ("def", "return", "if", "not", ",")


def rows_of(seed: int, *, count: int) -> list[dict[str, Any]]:
    """Texts of a few words, of which some are entities, told by offsets."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text, entities = f"{number}.{seed}", []
        for _ in range(draw.randint(2, 5)):
            kind = draw.choice([*NAMES, ""])
            word = draw.choice(NAMES[kind] if kind else PLAIN)
            if kind:
                start = len(text) + 1
                entities.append({"start": start, "end": start + len(word), "type": kind})
            text += f" {word}"
        rows.append({"text": text, "entities": entities})
    return rows


def config_of(folder: Path, name: str, *, models: Path, **options: Any) -> Config:
    """The config of a short run; options are sections or leaves of the config, merged."""
    paths = {part: folder / "text" / f"{part}.jsonl" for part in ("train", "validation")}
    for seed, path in enumerate(paths.values()):
        classified.write_rows(path, rows_of(seed, count=12))
    fields: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "steps": 4,
        "log_every": 1,
        "paths": {"runs": str(folder), "cache": str(folder / "cache")},
        "task": {"kind": "tagging"},
        "teachers": {"t": {"model": str(models / "teacher")}},
        "student": {"model": str(models / "bert"), "workers": 2},
        "domains": {"names": {part: str(path) for part, path in paths.items()}},
        "data": {"context": 64},
        "batch": {"rows_per_step": 8, "micro_batch": 2},
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimiser": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.01},
        "checkpoints": {"every": 2},
    }
    for option, value in options.items():
        old = fields.get(option)
        if isinstance(value, dict) and isinstance(old, dict) and option != "domains":
            value = {**old, **value}
        fields[option] = value
    return with_classes(Config.model_validate(fields))

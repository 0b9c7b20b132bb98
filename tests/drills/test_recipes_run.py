"""Recipes by command, on models and text that are tiny."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.commands.runs import RECIPES
from shared.run.metrics import StepMetrics, read_metrics
from shared.run.run_dir import RunDir
from tests import pictured
from tests.cluster.jobs import WORDS
from tests.student_trainer.tasks.classified import rows_of, write_rows
from tests.tiny import Pair

pytestmark = pytest.mark.drill

SHORT = {
    "steps": 2,
    "log_every": 1,
    "data.context": 64,
    "data.validation_rows": 4,
    "batch": {"rows_per_step": 4, "micro_batch": 2},
    "checkpoints.every": 2,
    "optimiser.warmup_steps": 0,
}


def texts(folder: Path) -> dict[str, Any]:
    rows = {
        name: [{"text": f"{' '.join(words)} {n} {' '.join(words[::-1])}"} for n in range(60)]
        for name, words in WORDS.items()
    }
    return {n: {"train": str(write_rows(folder / f"{n}.jsonl", r))} for n, r in rows.items()}


def taught(folder: Path) -> dict[str, Any]:
    """Texts of one teacher each."""
    teachers = zip(texts(folder).items(), ("code", "text"), strict=True)
    return {domain: {**section, "teacher": teacher} for (domain, section), teacher in teachers}


def pairs(folder: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"say {n}", "chosen": f"{n} it is", "rejected": "no answer"} for n in range(60)
    ]
    return {"pairs": {"train": str(write_rows(folder / "pairs.jsonl", rows))}}


def kinds(folder: Path) -> dict[str, Any]:
    files = {
        split: str(write_rows(folder / f"{split}.jsonl", rows_of(seed, count=30)))
        for seed, split in enumerate(("train", "validation"))
    }
    return {"kinds": files}


def shapes(folder: Path) -> dict[str, Any]:
    files = {
        split: str(pictured.captions(folder, split, count=12, seed=seed))
        for split, seed in (("train", 0), ("validation", 5))
    }
    return {"shapes": files}


def term(name: str) -> Callable[[StepMetrics], float | None]:
    return lambda line: line.terms[name]


def changed(line: StepMetrics) -> float | None:
    return sum(domain.changed_share or 0 for domain in line.domains.values())


def kappa(line: StepMetrics) -> float | None:
    return line.balance and line.balance.kappa


def least_kl(line: StepMetrics) -> float | None:
    """Of two teachers."""
    one, other = (found.kl or 0 for found in line.teachers.values())
    return min(one, other)


SHALLOW = [{"kind": "forward_kl"}, {"kind": "self_features", "layers": {1: 2}, "weight": 0.1}]
RUNS: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any], Callable]] = {
    "preference": (pairs, {}, term("preference")),
    "self_features": (texts, {"losses": SHALLOW}, term("self_features")),
    "reffakd": (kinds, {}, term("soft_cross_entropy")),
    "augment": (texts, {}, changed),
    "image_text": (shapes, {}, term("forward_kl")),
    "two_teachers": (taught, {"batch.rows_per_step": 16, "batch.micro_batch": 16}, least_kl),
    "commit": (shapes, {"optimiser.balance": {"every": 1}}, kappa),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_runs_and_does_what_it_is_for(
    ray_cluster, tmp_path: Path, tiny_pair: Pair, recipe: str
) -> None:
    write, options, found = RUNS[recipe]
    path = RECIPES / f"{recipe}.yaml"
    asked = yaml.safe_load(path.read_text())
    sees = asked.get("task") == "image_text"
    models = pictured.save_pair(tmp_path / "models") if sees else tiny_pair
    light = {"gpus": 0, "cpus": 0.2, "dtype": "float32"}
    named = {
        "teachers": {
            name: {**section, **light, "model": str(models.teacher)}
            for name, section in asked["teachers"].items()
        },
        "student": {**asked["student"], **light, "model": str(models.student)},
        "domains": write(tmp_path / "text"),
        "paths": {"root": str(tmp_path)}
        | {name: str(tmp_path / name) for name in ("runs", "cache")},
    }
    overrides = [
        f"{name}={json.dumps(value)}" for name, value in {**SHORT, **named, **options}.items()
    ]
    assert main(["run", str(path), *overrides]) == 0
    run = RunDir(tmp_path / "runs" / asked["name"])
    assert json.loads(run.summary.read_text())["status"] == "finished"
    lines = read_metrics(run.metrics)
    assert len(lines) == 2
    assert all((found(line) or 0) > 0 for line in lines)

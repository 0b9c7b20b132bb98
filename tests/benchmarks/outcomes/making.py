"""What trials need and no reference folder has: teachers that can do a task, few rows of a class.

Each is made once in the folder of records, by the same commands as a trial.
"""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from shared.run.run_dir import write_atomically
from tests.benchmarks.outcomes import rounds
from tests.benchmarks.outcomes.trials import (
    BASE,
    CLASSIFIER,
    FEW,
    MADE,
    MADE_SEED,
    ROWS_PER_CLASS,
    TAGGERS,
    Trial,
    of_corpus,
)

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "cluster" / "recipes"


def make_classifier(to: Path, *, folder: Path, root: Path) -> None:
    """A teacher of 6 M weights that learnt the intents of all training rows from their labels."""
    options = BASE | {
        "name": "classifier",
        "student.model": "models/teacher-6m",
        "teachers": "{none: {model: models/student-base-1m, engine: similarity, cpus: 0.1, "
        "similarity: {diagonal: 0.05, passes: 1}}}",
        "losses": "[{kind: cross_entropy}]",
        "optimiser.lr": "1e-3",
        "steps": "800",
        "baseline": "false",
        "seed": str(MADE_SEED),
    }
    command("classification", options, folder=folder, root=root)
    (folder / "runs" / "classifier" / "export").rename(to)


def make_tagger(to: Path, *, folder: Path, root: Path) -> None:
    """A teacher of 6 M weights that learnt the entities of all rows of a corpus."""
    corpus = next(name for name, made in TAGGERS.items() if made.endswith(to.name))
    options = of_corpus(corpus) | {
        "name": to.name,
        "student.model": "models/teacher-6m",
        "teachers": "{none: {model: models/student-base-1m, cpus: 0.1}}",
        "task.shots": "null",
        "losses": "[{kind: cross_entropy}]",
        "data.validation_rows": "4",  # which the teacher, who teaches nothing, reads word by word
        "batch": "{rows_per_step: 32, micro_batch: 32}",
        "steps": "400",
        "baseline": "false",
        "seed": str(MADE_SEED),
    }
    command("tagging", options, folder=folder, root=root)
    (folder / "runs" / to.name / "export").rename(to)


def make_few(to: Path, *, folder: Path, root: Path) -> None:
    """The same few rows of each class, whatever the seed of a trial."""
    rows = defaultdict(list)
    for path in sorted((root / "data" / "intent").glob("*.train.jsonl")):
        for line in path.read_text().splitlines():
            rows[json.loads(line)["response"]].append(line)
    draws = random.Random(MADE_SEED)
    kept = [line for own in rows.values() for line in draws.sample(own, ROWS_PER_CLASS)]
    write_atomically(to, "\n".join(kept))


def make_writer(to: Path, *, folder: Path, root: Path) -> None:
    """The text of the rounds, and the teacher that writes in them."""
    rounds.make_writer(to, folder=folder, root=root, command=command)


MAKERS: dict[str, Callable[..., None]] = {
    CLASSIFIER: make_classifier,
    FEW: make_few,
    f"{rounds.FOLDER}/writer": make_writer,
    **dict.fromkeys(TAGGERS.values(), make_tagger),
}


def command(
    recipe: str, options: dict[str, str], *, folder: Path, root: Path, verb: str = "run"
) -> None:
    """A command on a recipe. Raises CalledProcessError where it fails."""
    paths = {"paths.root": str(root), "paths.runs": str(folder / "runs")}
    paths["paths.cache"] = str(folder / "cache")
    made = {name: value.replace(MADE, f"{folder}/{MADE}") for name, value in options.items()}
    overrides = [f"{name}={value}" for name, value in (made | paths).items()]
    line = [sys.executable, "-m", "cluster", verb, str(RECIPES / f"{recipe}.yaml")]
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
    subprocess.run([*line, *overrides], cwd=ROOT, check=True, env=environment)


def make_missing(trial: Trial, *, folder: Path, root: Path) -> None:
    """What the trial names and nobody made yet."""
    for name, make in MAKERS.items():
        to = folder / name
        if any(name in value for value in trial.options.values()) and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            make(to, folder=folder, root=root)

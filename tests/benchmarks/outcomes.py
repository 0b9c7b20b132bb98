"""Do tasks, and teachers of other tokenizers, pay on real text? Recipes by command, over seeds.

    python -m tests.benchmarks.outcomes run --to FOLDER [--trials NAME ...] [--seeds 0 1 2]
    python -m tests.benchmarks.outcomes publish --to FOLDER

`run` gives the command of every trial and seed that has no record yet; `tutelage run` trains the
student and, with `baseline: true`, a copy on hard labels alone, so that both are paired. What a
trial needs and no reference folder has (a teacher that can do its task, few rows of each class) is
made first.
`publish` writes the tables of `RESULTS.md`.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.run.run_dir import write_atomically
from tests.benchmarks import rounds
from tests.benchmarks.methods.statistics import Record, estimate
from tests.benchmarks.methods.table import difference, level, markdown

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT.parent / "shared"
RECIPES = ROOT / "cluster" / "recipes"
RECORDS = Path(__file__).with_name("outcomes.json")
DOCUMENT = Path(__file__).with_name("RESULTS.md")
MADE = "made/"  # of paths in the folder of records
MADE_SEED = 100
ROWS_PER_CLASS = 10
CLASSIFIER, FEW = "made/classifier", "made/few.train.jsonl"
TAGGERS = {"wnut17": "made/wnut17-tagger", "ncbi_disease": "made/ncbi_disease-tagger"}
CLASSIFIED = {"teachers": f"{{head: {{model: {CLASSIFIER}, cpus: 0.5}}}}", "student.cpus": "0.5"}
BASE = CLASSIFIED | {
    "student.model": "models/student-base-1m",
    "optimiser.lr": "2e-3",
    "batch": "{rows_per_step: 32, micro_batch: 32}",
    "steps": "400",
}
FEW_ROWS = {"domains.intent.train": FEW}
STORIES = {
    "student.workers": "1",
    "student.zero": "0",
    "steps": "300",
    "data.validation_rows": "64",
}
SIMILAR = {"steps": "400", "student.cpus": "0.5"}
BACK = {
    "teachers": "{student-base-1m: {model: models/student-base-1m, cpus: 0.6}}",
    "student.model": "models/stories260k",
}
FORTH = "stories260k to student-base-1m"
ALIGNED = {"cross_tokenizer": "aligned"}
ULD = {
    "cross_tokenizer": "uld",
    "losses": "[{kind: total_variation, weight: 2}, {kind: cross_entropy}]",
}


def of_corpus(corpus: str, *, taught: bool = True) -> dict[str, str]:
    """Options of a run on one corpus of entities, whose teacher, where it is `taught`, has learnt
    all of its rows."""
    splits = {"train": "train", "validation": "valid"}
    paths = (f"{split}: data/ner/{corpus}.{part}.jsonl" for split, part in splits.items())
    found = {"domains": f"{{{corpus}: {{{', '.join(paths)}}}}}", "student.cpus": "0.5"}
    if taught:
        found["teachers"] = f"{{tagger: {{model: {TAGGERS[corpus]}, cpus: 0.5}}}}"
    return found


@dataclass(frozen=True)
class Trial:
    """A recipe with options on top, in which both students of a run are compared."""

    name: str
    title: str
    recipe: str
    options: dict[str, str] = field(default_factory=dict)  # `a.b` -> value as in YAML
    verb: str = "run"
    seeded: tuple[str, ...] = ("seed",)  # options that are the seed


@dataclass(frozen=True)
class Table:
    """Trials that are measured alike."""

    mark: str  # in RESULTS.md
    measures: dict[str, str]  # title -> key of a record's measures
    trials: tuple[Trial, ...]
    against: tuple[tuple[str, str], ...] = ()  # pairs of trials, compared by their students
    baseline: str = "hard labels"  # what a student is compared with in its own run
    student: str = "distilled"


CLASSES = Table(
    "classes",
    {"accuracy": "accuracy", "macro F1": "macro_f1", "ECE": "calibration_error"},
    (
        Trial("tiny", "0.03 M weights", "classification", CLASSIFIED),
        Trial("tiny-few", "0.03 M weights, few rows", "classification", CLASSIFIED | FEW_ROWS),
        Trial("base", "1 M student", "classification", BASE),
        Trial("base-few", "1 M student, few rows", "classification", BASE | FEW_ROWS),
        Trial(
            "base-llkd",
            "1 M student, LLKD",
            "classification",
            BASE | {"weighting": "{policy: llkd}"},
        ),
        Trial(
            "reffakd", "ReffAKD, 1 M student", "reffakd", {"steps": "400", "student.cpus": "0.5"}
        ),
        Trial(
            "reffakd-few",
            "ReffAKD, 1 M student, few rows",
            "reffakd",
            SIMILAR | FEW_ROWS | {"teachers.similar.similarity.diagonal": "0.1"},
        ),
    ),
    (("base-llkd", "base"),),
)
ACROSS = Table(
    "across",
    {"NLL": "nll"},
    (
        Trial("grouped", f"{FORTH}, grouped", "cross_tokenizer", STORIES),
        Trial("aligned", f"{FORTH}, aligned", "cross_tokenizer", STORIES | ALIGNED),
        Trial("uld", f"{FORTH}, ULD", "cross_tokenizer", STORIES | ULD),
        Trial("back-grouped", "and back, grouped", "cross_tokenizer", STORIES | BACK),
        Trial("back-aligned", "and back, aligned", "cross_tokenizer", STORIES | BACK | ALIGNED),
        Trial("back-uld", "and back, ULD", "cross_tokenizer", STORIES | BACK | ULD),
    ),
    (
        ("grouped", "aligned"),
        ("uld", "aligned"),
        ("back-grouped", "back-aligned"),
        ("back-uld", "back-aligned"),
    ),
)
ROUNDS = Table(
    "rounds",
    {"accuracy": "accuracy"},
    (Trial("pgkd", "PGKD, 3 rounds", "pgkd", rounds.OPTIONS, verb="active"),),
    baseline="few labels",
    student="best round",
)
TAGS = Table(
    "tags",
    {"span F1": "span_f1"},
    tuple(
        Trial(
            f"{corpus}-{shots}",
            f"{corpus}, {shots} of each type",
            "tagging",
            of_corpus(corpus) | {"task.shots": str(shots)},
            seeded=("seed", "task.episode"),
        )
        for corpus in TAGGERS
        for shots in (1, 5, 20)
    ),
)
MARKS = Table(
    "marks",
    {"span F1": "span_f1"},
    tuple(
        Trial(
            f"cllmfs-{corpus}-{shots}",
            f"{corpus}, {shots} of each type",
            "cllmfs",
            of_corpus(corpus, taught=False) | {"task.shots": str(shots)},
            seeded=("seed", "task.episode"),
        )
        for corpus in TAGGERS
        for shots in (1, 5, 20)
    ),
    baseline="without contrast",
    student="CLLMFS",
)
TABLES = (CLASSES, ACROSS, ROUNDS, TAGS, MARKS)
TRIALS = {trial.name: trial for table in TABLES for trial in table.trials}


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


def run_trial(trial: Trial, seed: int, *, folder: Path, root: Path) -> Record:
    """Both students' measures; the run's folder is removed."""
    make_missing(trial, folder=folder, root=root)
    name = f"{trial.name}-{seed}"
    options = trial.options | {"name": name} | dict.fromkeys(trial.seeded, str(seed))
    run = folder / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    command(trial.recipe, options, folder=folder, root=root, verb=trial.verb)
    measured = rounds.measures_of_rounds(run, folder) if trial.verb == "active" else both(run)
    record = {
        "trial": trial.name,
        "seed": seed,
        "options": trial.options,
        "measures": measured,
    }
    shutil.rmtree(run)
    return record


def both(run: Path) -> dict[str, dict[str, float]]:
    """The measures of both students of a run's folder."""
    files = ("summary.json", "baseline.json")
    return measures_of(*(json.loads((run / name).read_text()) for name in files))


def measures_of(summary: dict[str, Any], baseline: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of a run with one domain, by measure: the teacher's value where it has one, the student's
    before and after, and that of the copy on hard labels."""
    ((name, domain),) = summary["domains"].items()
    nll = {
        "teacher": domain["teacher_nll"],
        "before": domain["student_nll_before"],
        "after": domain["student_nll_after"],
        "hard": baseline["students"][name]["hard_labels_nll"],
    }
    found = {"nll": nll, **domain.get("classes", {})}
    return {
        measure: {who: value for who, value in told.items() if value is not None}
        for measure, told in found.items()
    }


def record_path(folder: Path, name: str, seed: int) -> Path:
    """Where a trial's record lies."""
    return folder / "outcomes" / f"{name}-{seed}.json"


def run(names: Sequence[str], seeds: Sequence[int], *, folder: Path, root: Path) -> None:
    """Every trial and seed without a record of the same options, seed by seed."""
    for seed in seeds:
        for trial in (TRIALS[name] for name in names):
            path = record_path(folder, trial.name, seed)
            if path.exists() and json.loads(path.read_text())["options"] == trial.options:
                continue
            record = run_trial(trial, seed, folder=folder, root=root)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, indent=1))


def text_of(table: Table, records: Sequence[Record]) -> str:
    """The Markdown of a table: each trial's students and their difference, then trials compared."""
    header = ["student", "measure", "teacher", table.baseline, table.student, "difference"]
    lines = [
        [trial.title, title, *_line(of_trial(records, trial.name), key)]
        for trial in table.trials
        for title, key in table.measures.items()
        if of_trial(records, trial.name)
    ]
    header_2 = [f"difference of the {table.student}", *table.measures]
    pairs = list(_compared(table, records))
    return "\n".join([markdown(header, lines), *([markdown(header_2, pairs)] if pairs else [])])


def of_trial(records: Sequence[Record], name: str) -> list[Record]:
    """A trial's records, by seed."""
    return sorted((r for r in records if r["trial"] == name), key=lambda r: r["seed"])


def _line(own: Sequence[Record], key: str) -> list[str]:
    told = [record["measures"][key] for record in own]
    teacher = [one["teacher"] for one in told if "teacher" in one]
    after, hard = ([one[who] for one in told] for who in ("after", "hard"))
    apart = [one - other for one, other in zip(after, hard, strict=True)]
    return [
        level(estimate(teacher[:1])) if teacher else "",
        level(estimate(hard)),
        level(estimate(after)),
        difference(estimate(apart)),
    ]


def _compared(table: Table, records: Sequence[Record]) -> Iterator[list[str]]:
    titles = {trial.name: trial.title for trial in table.trials}
    for one, other in table.against:
        pair = [{r["seed"]: r for r in of_trial(records, name)} for name in (one, other)]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        if not seeds:
            continue
        cells = []
        for key in table.measures.values():
            values = [[own[s]["measures"][key]["after"] for s in seeds] for own in pair]
            cells.append(difference(estimate([a - b for a, b in zip(*values, strict=True)])))
        yield [f"{titles[one]} \u2212 {titles[other]}", *cells]


def with_tables(document: str, records: Sequence[Record]) -> str:
    """The document with other tables between its marks."""
    for table in TABLES:
        begin, end = f"<!-- {table.mark}: begin -->\n", f"<!-- {table.mark}: end -->"
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = before + begin + text_of(table, records) + end + after
    return document


def published() -> list[Record]:
    """The records in the project."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def publish(folder: Path) -> None:
    """Write a folder's records into the project, in place of those of the same trials and seeds."""
    found = [json.loads(path.read_text()) for path in (folder / "outcomes").glob("*.json")]
    known = {(record["trial"], record["seed"]): record for record in (*published(), *found)}
    records = [known[key] for key in sorted(known)]
    write_atomically(RECORDS, "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    write_atomically(DOCUMENT, with_tables(DOCUMENT.read_text(), records))


def main() -> int:
    """Parse the command line and do one thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("run", "publish"))
    parser.add_argument("--to", type=Path, required=True, help="folder of records, kept")
    parser.add_argument("--trials", nargs="*", choices=tuple(TRIALS), default=tuple(TRIALS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=REFERENCE, help="where models and data lie")
    options = parser.parse_args()
    folder, root = options.to.absolute(), options.root.absolute()
    if options.verb == "publish":
        publish(folder)
    else:
        run(options.trials, options.seeds, folder=folder, root=root)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.run.run_dir import write_atomically
from tests.benchmarks.methods.statistics import Record
from tests.benchmarks.outcomes import rounds
from tests.benchmarks.outcomes.making import ROOT, command, make_missing
from tests.benchmarks.outcomes.publishing import publish
from tests.benchmarks.outcomes.trials import TRIALS, Trial

REFERENCE = ROOT.parent / "shared"


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

"""Runs as they lie on disk, to be gone on with by all code that comes after.

`runs.tar.xz` holds two of two ranks, ZeRO 2 and ZeRO 3, killed after step 3 of 6, and beside each
the metrics of the run that was not killed. It stays as it is; `python -m
tests.student_trainer.state.frozen FILE` writes another one in the form of its time.
"""

import json
import shutil
import tarfile
from pathlib import Path

from shared.run.metrics import drop_metrics_after
from shared.run.plan import RunPlan
from tests import tiny
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains

ARCHIVE = Path(__file__).parent / "runs.tar.xz"
STAGES = (2, 3)
MIDDLE, END = 3, 6
WHOLE = "whole.jsonl"  # the metrics of a run that was not killed


def name_of(zero: int) -> str:
    """Folder of the run of a stage."""
    return f"2-ranks-zero{zero}"


def plan(folder: Path, name: str, *, ranks: int, zero: int) -> RunPlan:
    """The run of a name, on so many ranks; the models are made where there are none."""
    pair = tiny.Pair(folder / "teacher", folder / "student")
    if not pair.student.exists():
        for path in (pair.teacher, pair.student):
            tiny.save_model(path, width=8, layers=1)
    made = plan_of(
        folder / name,
        pair,
        prepared_domains(folder),
        steps=END,
        log_every=1,
        student={"zero": zero, "workers": ranks},
        losses=[{"kind": "cross_entropy"}],
        checkpoints={"every": MIDDLE},
    )
    mark_exported(made)
    return made


def freeze(folder: Path, archive: Path) -> None:
    """Make the runs in a folder and an archive of them."""
    from tests.student_trainer.group import run_jobs
    from tests.student_trainer.processes import as_job

    plans = [plan(folder, name_of(zero), ranks=2, zero=zero) for zero in STAGES]
    for result in run_jobs([as_job("train", made) for made in plans], folder / "jobs"):
        assert result["error"] is None, result
    with tarfile.open(archive, "w:xz", preset=9) as kept:
        for made in plans:
            run = Path(made.run_dir)
            shutil.copy(run / "metrics.jsonl", run / WHOLE)
            shutil.rmtree(run / "checkpoints" / f"step-{END:06d}")
            evaluations = json.loads((run / "evaluations.json").read_text())
            (run / "evaluations.json").write_text(json.dumps({"before": evaluations["before"]}))
            for file in ("checkpoints", "evaluations.json", "metrics.jsonl", "weight_log.jsonl"):
                if (run / file).exists():
                    kept.add(run / file, f"{run.name}/{file}")
            kept.add(run / WHOLE, f"{run.name}/{WHOLE}")


def thaw(folder: Path) -> None:
    """Lay the runs into a folder."""
    with tarfile.open(ARCHIVE) as kept:
        kept.extractall(folder, filter="data")
    for zero in STAGES:
        drop_metrics_after(folder / name_of(zero) / "metrics.jsonl", MIDDLE)

"""Evaluations of a run: student against teacher on validation text, each written once."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from shared.config.run import Config
from shared.run.run_dir import write_atomically
from student_trainer.progress import say
from student_trainer.run import Run
from student_trainer.tasks.task import Evaluation

EVALUATIONS = "evaluations.json"
ONE_EVALUATION = "evaluation.json"
LATEST = "latest"  # what documents of the student as it is are called beside `before` and `after`


def evaluate(run: Run, when: str) -> None:
    """Compare student and teacher on validation text, once per run for `before` and `after`."""
    written = read_evaluations(run.files.path) if run.ranks.leads else {}
    if run.ranks.from_leader(when in written):
        return
    found = run.task.evaluate(run)
    if run.ranks.leads:
        _write_documents(run, found, when)
        written[when] = {name: asdict(value) for name, value in found.domains.items()}
        write_atomically(run.files.path / EVALUATIONS, json.dumps(written, indent=1))
        if when == "before":
            for sentence in weak_teachers(run.config, written[when]):
                say(run, sentence)


def forget_after(run: Run) -> None:
    """Drop the evaluation after training of a run that takes more steps."""
    if run.ranks.leads:
        written = read_evaluations(run.files.path)
        if written.pop("after", None) is not None:
            write_atomically(run.files.path / EVALUATIONS, json.dumps(written, indent=1))


def weak_teachers(config: Config, before: Mapping[str, Mapping]) -> list[str]:
    """A sentence for every domain on whose validation text the student starts as well as its
    teacher does; `before` has its losses by domain."""
    found = []
    for name, measured in before.items():
        teacher, student = measured["teacher_nll"], measured["student_nll"]
        if teacher is not None and teacher >= student:
            found.append(
                f"the teacher {config.teacher_of(name)} is no better than the student on "
                f"validation text of {name} before training: {teacher:.3f} against {student:.3f} "
                f"nats per token; look at domains.{name} and the models, or go on"
            )
    return found


def evaluate_only(run: Run) -> None:
    """Evaluate the student as it is and write `evaluation.json`."""
    found = run.task.evaluate(run)
    if run.ranks.leads:
        _write_documents(run, found, LATEST)
        values = {name: asdict(value) for name, value in found.domains.items()}
        write_atomically(run.files.path / ONE_EVALUATION, json.dumps(values, indent=1))


def _write_documents(run: Run, found: Evaluation, when: str) -> None:
    if found.documents is not None:
        found.documents.write(run.files.documents(when))


def read_evaluations(run_dir: Path) -> dict[str, dict]:
    """What is written of a run so far: by `before` and `after`, then by domain."""
    path = run_dir / EVALUATIONS
    return json.loads(path.read_text()) if path.exists() else {}

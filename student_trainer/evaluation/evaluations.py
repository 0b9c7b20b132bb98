"""Evaluations of a run: student against teacher on validation text, each written once."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from shared.config.run import Config
from shared.errors import HandshakeError
from shared.run.metrics import DomainEvaluation
from shared.run.plan import RunPlan
from shared.run.run_dir import read_written, write_atomically
from student_trainer.metrics.progress import say
from student_trainer.run import Run
from student_trainer.tasks.task import Evaluation

EVALUATIONS = "evaluations.json"
ONE_EVALUATION = "evaluation.json"
LATEST = "latest"  # what documents of the student as it is are called beside `before` and `after`


def evaluate(run: Run, when: str) -> None:
    """Compare student and teacher on validation text, once per run for `before` and `after`.

    Before the first step of a run that learns from a teacher its KL is said. Raises HandshakeError,
    on all ranks together, for a student that is further from its teacher than one could be that
    knows nothing.
    """
    written = read_evaluations(run.files.path) if run.ranks.leads else {}
    if run.ranks.from_leader(when in written):
        return
    found = run.task.evaluate(run)
    if when == "before" and run.plan.training_question is not None:
        unit = run.config.task.unit
        if run.ranks.leads and (sentence := starting_kl(found.domains, unit=unit)):
            say(run, sentence)
        if not run.config.task.classifies:  # a new head may be surely wrong
            refuse_far_student(run.plan, found.domains)
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


def starting_kl(before: Mapping[str, DomainEvaluation], *, unit: str = "token") -> str | None:
    """A sentence with the KL of the unchanged student by domain; None where no teacher is there to
    compare with."""
    kls = [f"{name} {found.kl:.3f}" for name, found in before.items() if found.kl is not None]
    if not kls:
        return None
    return f"KL of the unchanged student to its teacher, nats per {unit}: {', '.join(kls)}"


def refuse_far_student(plan: RunPlan, before: Mapping[str, DomainEvaluation]) -> None:
    """Raise HandshakeError where the student's KL to its teacher, before any step, is no number or
    above ln V, that of a uniform student from a teacher who is always sure; V are the shared ids.
    Above ln V it may be asked for by `evaluation.far_student`."""
    for name, found in before.items():
        teacher = plan.config.teacher_of(name)
        question = plan.by_teacher[teacher].validation_question
        if found.kl is None or question is None:
            continue
        most = math.log(question.ask.shared_vocab)
        # Of spans of several tokens KL has another bound.
        is_bounded = plan.config.evaluation.far_student != "say" and not plan.config.cross_tokenizer
        said = not is_bounded and math.isfinite(found.kl)
        if not found.kl <= most and not said:
            raise HandshakeError(
                f"before its first step the student's KL to the teacher {teacher} is {found.kl:.3f}"
                f" nats per token on validation text of {name}, and that of a student who knows "
                f"nothing is at most ln {question.ask.shared_vocab:,} = {most:.3f}; most likely a "
                f"tokenizer or teachers.{teacher}.model is another than the student's, or weights "
                f"are damaged: look at both models and at domains.{name}, then run the same "
                "command again; where both are sound, set evaluation.far_student=say"
            )


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
                f"nats per {config.task.unit}; look at domains.{name} and the models, or go on"
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
    return read_written(run_dir / EVALUATIONS)

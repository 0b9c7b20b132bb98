"""How well classes are told apart, of runs whose task has some: for `summary.json` and tables."""

from typing import NamedTuple, TypedDict

from cluster.report.record import RunRecord
from shared.run.metrics import ClassScores

SCORES = ("accuracy", "macro_f1", "calibration_error")
TITLES = ("accuracy", "macro F1", "ECE")
WHO = ("teacher", "before", "after", "hard")


class ClassSummary(TypedDict):
    """One score by who has it; None of one that was not measured."""

    teacher: float | None
    before: float | None
    after: float | None
    hard: float | None  # the student on hard labels alone


class ClassLine(NamedTuple):
    """A line of the table: a domain, and for each of `SCORES` one number of each of `who`."""

    domain: str
    values: list[list[float | None]]


def class_summary(record: RunRecord, name: str) -> dict[str, ClassSummary] | None:
    """The scores of a domain by name; None where its rows have no classes."""
    before, after = record.before.get(name), record.after.get(name)
    known = after or before
    if known is None or known.student_scores is None:
        return None
    hard = record.baseline.after.get(name) if record.baseline else None
    scored = {
        "teacher": known.teacher_scores,
        "before": before.student_scores if before else None,
        "after": after.student_scores if after else None,
        "hard": hard.student_scores if hard else None,
    }
    return {
        score: ClassSummary(**{who: _value(found, score) for who, found in scored.items()})
        for score in SCORES
    }


def class_lines(record: RunRecord) -> tuple[list[str], list[ClassLine]]:
    """Who is measured, and a line per domain; no line where rows have no classes."""
    who = [name for name in WHO if name != "hard" or record.baseline]
    found = {name: class_summary(record, name) for name in record.domains}
    lines = [
        ClassLine(name, [[own[score][model] for model in who] for score in SCORES])
        for name, own in found.items()
        if own is not None
    ]
    return who, lines


def _value(found: ClassScores | None, score: str) -> float | None:
    return None if found is None else getattr(found, score)

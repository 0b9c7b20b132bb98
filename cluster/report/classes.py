"""How well classes are told apart, or entities found, of runs whose task has some: for
`summary.json` and tables."""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

from cluster.report.record import RunRecord
from shared.run.metrics import ClassScores, SpanScores, TagScores

# By the scores of `summary.json` what they are called in tables.
OF_CLASSES = {"accuracy": "accuracy", "macro_f1": "macro F1", "calibration_error": "ECE"}
COSTS = ("weights", "row_ms")  # of those that tell classes, beside the scores
OF_SPANS = {"span_f1": "span F1", "precision": "precision", "recall": "recall"}
WHO = ("teacher", "before", "after", "hard")

Scores = ClassScores | SpanScores | None


class ClassSummary(TypedDict):
    """One score by who has it; None of one that was not measured."""

    teacher: float | None
    before: float | None
    after: float | None
    hard: float | None  # the student on hard labels alone


class ClassLine(NamedTuple):
    """A line of the table: a domain, or a type of entities in it, and for each score one number of
    each of `who`."""

    domain: str
    values: list[list[float | None]]


class ClassTable(NamedTuple):
    """What tables have of the scores of a run."""

    titles: tuple[str, ...]
    who: list[str]
    lines: list[ClassLine]  # none where rows have no classes
    note: str
    costs: list[str]  # by domain, what teacher and student take to tell the class of a row


def class_summary(record: RunRecord, name: str) -> dict[str, ClassSummary] | None:
    """The scores of a domain by name, those of a type of entities as `TYPE span_f1`; None where its
    rows have no classes."""
    scored = _scored(record, name)
    known = scored["after"] or scored["before"]
    if known is None:
        return None
    titles = OF_SPANS if isinstance(known, TagScores) else OF_CLASSES
    costs = COSTS if titles is OF_CLASSES else ()
    found = {score: _by_who(scored, score) for score in (*titles, *costs)}
    for kind in _types(scored):
        found |= {f"{kind} {score}": _by_who(_of_type(scored, kind), score) for score in OF_SPANS}
    return found


def class_table(record: RunRecord) -> ClassTable:
    """A line per domain, and below it one per type of entities."""
    who = [name for name in WHO if name != "hard" or record.baseline]
    titles, lines = OF_CLASSES, []
    for name in record.domains:
        found = class_summary(record, name)
        if found is None:
            continue
        titles = OF_SPANS if "span_f1" in found else OF_CLASSES
        firsts = ["", *(f"{kind} " for kind in _types(_scored(record, name)))]
        for first in firsts:
            values = [[found[f"{first}{score}"][one] for one in who] for score in titles]
            lines.append(ClassLine(f"  {first.strip()}" if first else name, values))
    note = (
        "Macro F1: the mean over classes. ECE: the expected calibration error over 15 bins of "
        "confidence; lower is better."
    )
    if titles is OF_SPANS:
        note = (
            "Of whole entities with their types, as seqeval counts them, in what of a text fits "
            "data.context."
        )
    return ClassTable(tuple(titles.values()), who, lines, note, list(_costs(record)))


def _costs(record: RunRecord) -> Iterator[str]:
    for name in record.domains:
        found = class_summary(record, name) or {}
        if not found.keys() >= set(COSTS):
            continue
        who = {"teacher": "teacher", "student": "after" if record.after else "before"}
        told = [_cost(model, *(found[cost][key] for cost in COSTS)) for model, key in who.items()]
        if any(told):
            yield f"{name}: " + "; ".join(filter(None, told))


def _cost(model: str, weights: float | None, row_ms: float | None) -> str:
    """Weights of a model and the time of a row, as far as they are known."""
    parts = [] if weights is None else [f"{weights / 1e6:,.2f} M weights"]
    parts += [] if row_ms is None else [f"{row_ms:,.2f} ms a row"]
    return f"{model} {', '.join(parts)}" if parts else ""


def _scored(record: RunRecord, name: str) -> dict[str, ClassScores | TagScores | None]:
    """The scores of a domain by who has them."""
    before, after = record.before.get(name), record.after.get(name)
    known = after or before
    hard = record.baseline.after.get(name) if record.baseline else None
    return {
        "teacher": known.teacher_scores if known else None,
        "before": before.student_scores if before else None,
        "after": after.student_scores if after else None,
        "hard": hard.student_scores if hard else None,
    }


def _types(scored: dict[str, ClassScores | TagScores | None]) -> list[str]:
    """Types of entities that rows have or a model said; none of classes."""
    return sorted({t for one in scored.values() if isinstance(one, TagScores) for t in one.types})


def _of_type(
    scored: dict[str, ClassScores | TagScores | None], kind: str
) -> dict[str, SpanScores | None]:
    return {
        who: one.types.get(kind) if isinstance(one, TagScores) else None
        for who, one in scored.items()
    }


def _by_who(scored: dict, score: str) -> ClassSummary:
    return ClassSummary(**{who: _value(found, score) for who, found in scored.items()})


def _value(found: Scores, score: str) -> float | None:
    return None if found is None else getattr(found, score)

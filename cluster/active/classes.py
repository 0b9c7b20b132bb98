"""How a student does class by class: precision, recall and F1 of its answers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.active.answers import Answer


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class; 0 where a share is of nothing."""

    precision: float
    recall: float
    f1: float
    rows: int  # that are of it
    answered: int  # that were said to be


def by_class(answers: Sequence[Answer], classes: Iterable[str]) -> dict[str, ClassScore]:
    """Scores of every class, in the order of `classes`."""
    of = Counter(answer.right for answer in answers)
    said = Counter(answer.text for answer in answers)
    right = Counter(answer.right for answer in answers if answer.is_right)
    return {name: _score(right[name], of[name], said[name]) for name in classes}


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return sum(answer.is_right for answer in answers) / len(answers)


def macro_f1(scores: Iterable[ClassScore]) -> float:
    """The mean F1 of classes that a row has or is said to have."""
    present = [score.f1 for score in scores if score.rows or score.answered]
    return sum(present) / len(present) if present else 0.0


def weakest(scores: dict[str, ClassScore], count: int) -> list[str]:
    """Names of the classes with rows or answers whose F1 is lowest; ties go to the larger, then by
    name."""
    seen = [name for name, score in scores.items() if score.rows or score.answered]
    return sorted(seen, key=lambda name: (scores[name].f1, -scores[name].rows, name))[:count]


def _score(right: int, rows: int, answered: int) -> ClassScore:
    precision, recall = (right / count if count else 0.0 for count in (answered, rows))
    f1 = 2 * right / (rows + answered) if right else 0.0
    return ClassScore(precision, recall, f1, rows, answered)

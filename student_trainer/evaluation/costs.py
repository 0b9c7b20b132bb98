"""What it takes to tell the class of one row: the weights of student and teacher, and the time of
each, asked about one row at a time.

The teacher's time is from the question to the answer, its way through the service included; of
answers that lie on disk there is none.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from shared.data.rows import Rows
from shared.targets.question import Question
from student_trainer.models.frozen import num_weights

if TYPE_CHECKING:
    from student_trainer.run import Run

ROWS = 9  # of a domain that are asked about, one by one; the first warms up
MS = 1e3


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one model."""

    weights: int | None  # None: it has none, or they are not known
    row_ms: float | None  # median; None: not measured


def costs_of(run: "Run") -> list[tuple[Cost, Cost]]:
    """Of student and teacher, by domain; all ranks together."""
    weights = sum(map(num_weights, run.student.saved.parameters()))
    found = []
    for name, store in zip(run.config.domains, run.validation.stores, strict=True):
        plan = run.plan.by_teacher[run.config.teacher_of(name)]
        rows = [store.take([index]) for index in range(min(ROWS, len(store)))]
        taught_ms = _teachers(run, rows, run.plan.validation_question)
        student_ms = _median([_students(run, row) for row in rows])
        found.append((Cost(weights, student_ms), Cost(plan.teacher_weights or None, taught_ms)))
    return found


@torch.no_grad()
def _students(run: "Run", row: Rows) -> float:
    """Milliseconds from a row to its logits on the host."""
    run.engine.eval()
    began = time.perf_counter()
    (logits_1C,) = run.engine(run.layouts.batch(row), mode="logits")
    logits_1C.cpu()
    taken = MS * (time.perf_counter() - began)
    run.engine.train()
    return taken


def _teachers(run: "Run", rows: list[Rows], question: Question | None) -> float | None:
    """Milliseconds from a question to its answer, where a teacher gave it."""
    if run.reader is None or question is None:
        return None
    hits, taken = run.reader.stats.cache_hits, []
    for row in rows:
        began = time.perf_counter()
        run.validation.answer(run.reader, row, question)
        taken.append(MS * (time.perf_counter() - began))
    return _median(taken) if run.reader.stats.cache_hits == hits else None


def _median(taken: list[float]) -> float | None:
    """Without the first, which warms up."""
    return median(taken[1:]) if len(taken) > 1 else None

"""Validation: nats per token and KL to the teacher, domain by domain.

Units are dealt to the ranks in a fixed order and sums are reduced, never averages, so that the
result does not depend on the number of ranks beyond rounding. Every rank makes the same number of
forward passes; a rank without a unit left runs an empty one.

G domains in config order
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.data.teacher_rows import TeacherRows
from shared.run.metrics import DomainEvaluation
from shared.targets.paired import paired
from shared.targets.question import Question
from shared.targets.reader import answered
from shared.targets.routing import Answer, RunReader
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch, Layouts

UNITS_AHEAD = 2


class Measuring(Protocol):
    """What is told how a student does on each unit."""

    def add(self, rows: Rows, batch: Batch, measured_8N: torch.Tensor, /) -> None:
        """Add a unit, from what mode `measure` of the objective tells of its positions."""
        ...


@dataclass(frozen=True, slots=True)
class ValidationSums:
    """Sums over all ranks and validation rows, float64 [G]; nats."""

    student_nll_G: np.ndarray
    teacher_nll_G: np.ndarray
    kl_G: np.ndarray
    tokens_G: np.ndarray

    @property
    def mean_nll(self) -> float:
        """The student's, over all tokens."""
        return float(self.student_nll_G.sum() / max(1.0, self.tokens_G.sum()))

    def evaluations(self, kl_kinds: Mapping[str, str]) -> dict[str, DomainEvaluation]:
        """Per token of each domain, in config order; without a teacher (kind "none") there is no
        teacher_nll and no KL."""
        tokens_G = np.maximum(self.tokens_G, 1)
        columns = (self.student_nll_G, self.teacher_nll_G, self.kl_G)
        student, teacher, kl = ((column / tokens_G).tolist() for column in columns)
        return {
            name: DomainEvaluation(
                student_nll=student[g],
                teacher_nll=None if kind == "none" else teacher[g],
                kl=None if kind == "none" else kl[g],
                kl_kind=kind,
                tokens=int(self.tokens_G[g]),
            )
            for g, (name, kind) in enumerate(kl_kinds.items())
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation rows of every domain, and how to run the student on them."""

    stores: tuple[RowStore, ...]
    layouts: Layouts
    ranks: Ranks
    rows_per_unit: int
    teacher_rows: TeacherRows | None = None  # read by the teacher in place of those of `stores`

    def sums(
        self,
        engine: Any,
        reader: RunReader | None = None,
        question: Question | None = None,
        *,
        documents: "Measuring | None" = None,
        rows: int | None = None,
    ) -> ValidationSums:
        """Run over all validation rows, or the first `rows` of each domain; with a reader also
        against the teacher. What each document adds is told to `documents`."""
        mode = "evaluate" if documents is None else "measure"
        size = unit_size(self.rows_per_unit, question)
        units = list(self.own_units(size, rows=rows))
        num_domains = len(self.stores)
        totals = np.zeros((4, num_domains))
        engine.eval()
        with torch.no_grad():
            answers = self._answers(units, reader, question)
            bar = tqdm(answers, total=len(units), desc="validation", leave=False, disable=None)
            for unit, targets in bar:
                batch = self.layouts.batch(unit, targets)
                nll_kl_2G, *measured = engine(batch, mode=mode)
                if documents is not None and len(unit):
                    documents.add(unit, batch, *measured)
                totals[[0, 2]] += nll_kl_2G.double().cpu().numpy()
                totals[[1, 3]] += _teacher_and_tokens(batch, num_domains)
        engine.train()
        return ValidationSums(*self.ranks.sum(totals))

    def own_units(self, size: int, *, rows: int | None = None) -> Iterator[Rows]:
        """This rank's units of the first `rows` of each domain, or all, padded with empty ones to
        the same number on every rank."""
        world_size = self.ranks.world_size
        lengths = [len(store) if rows is None else min(rows, len(store)) for store in self.stores]
        chosen = [
            (store, range(first, min(first + size, length)))
            for store, length in zip(self.stores, lengths, strict=True)
            for first in range(0, length, size)
        ]
        for position in range(
            self.ranks.rank, -(-len(chosen) // world_size) * world_size, world_size
        ):
            store, indices = chosen[position] if position < len(chosen) else (self.stores[0], ())
            yield store.take(list(indices))

    def _answers(
        self, units: Sequence[Rows], reader: RunReader | None, question: Question | None
    ) -> Iterator[tuple[Rows, Answer | None]]:
        """Units with the teacher's answers, a few asked for ahead; empty units are never sent."""
        if reader is None or question is None:
            yield from ((rows, None) for rows in units)
            return
        asked, own = filter(len, units), self.teacher_rows
        sent = asked if own is None else map(own.of, asked)
        answers = answered(reader, sent, question, ahead=UNITS_AHEAD)
        for rows in units:
            yield rows, self._taken(*next(answers)) if len(rows) else None

    def answer(self, reader: RunReader, rows: Rows, question: Question) -> Answer:
        """What the teacher says of one unit of validation rows."""
        sent = rows if self.teacher_rows is None else self.teacher_rows.of(rows)
        ((_, found),) = answered(reader, [sent], question, ahead=1)
        return self._taken(sent, found)

    def _taken(self, sent: Rows, answer: Answer) -> Answer:
        return answer if self.teacher_rows is None else paired(sent, answer)


def unit_size(rows_per_unit: int, question: Question | None) -> int:
    """Rows of a validation unit: one where the answers are bulky."""
    return rows_per_unit if question is None or not question.ask.is_bulky else 1


def _teacher_and_tokens(batch: Batch, num_domains: int) -> np.ndarray:
    domain_N = batch["domain_N"].cpu().numpy()
    tokens_G = np.bincount(domain_N, minlength=num_domains)
    if "label_logprob_N" not in batch:
        return np.stack([np.zeros(num_domains), tokens_G])
    nll_N = -batch["label_logprob_N"].double().cpu().numpy()
    return np.stack([np.bincount(domain_N, weights=nll_N, minlength=num_domains), tokens_G])

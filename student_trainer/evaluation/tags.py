"""How well entities are found: F1 of whole spans of student and teacher by domain.

N words of a unit   G domains in config order   M models: student, teacher
Y types of entities, sorted
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor

from shared.data.rows import Rows
from shared.run.metrics import SpanScores, TagScores
from student_trainer.evaluation.documents import DocumentAccumulator
from student_trainer.evaluation.labelled import MODELS, evaluate_labelled
from student_trainer.objective import MEASURED
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run

RIGHT, TOLD, TRUE = range(3)  # spans that are both, of the model, of the row


@dataclass(slots=True)
class SpanSums:
    """Counts of spans over rows, of this rank."""

    num_domains: int
    tags: tuple[str, ...]
    documents: DocumentAccumulator = field(default_factory=DocumentAccumulator)
    types: list[str] = field(init=False)
    spans_MGY3: np.ndarray = field(init=False)
    words_MG: np.ndarray = field(init=False)  # of which a model said something

    def __post_init__(self) -> None:
        self.types = sorted({tag[2:] for tag in self.tags if tag[2:]})
        self.spans_MGY3 = np.zeros((len(MODELS), self.num_domains, len(self.types), 3))
        self.words_MG = np.zeros((len(MODELS), self.num_domains))

    def add(self, rows: Rows, batch: Batch, measured_8N: Tensor) -> None:
        """Add a unit, as a `DocumentAccumulator` does."""
        self.documents.add(rows, batch, measured_8N)
        value_N: dict[str, np.ndarray] = dict(zip(MEASURED, measured_8N.cpu().numpy(), strict=True))
        names = ("row_N", "domain_N", "label_N")
        row_N, domain_N, label_N = (batch[name].cpu().numpy() for name in names)
        for model, name in enumerate(MODELS):
            choice_N = value_N[f"{name}_choice"]
            if np.isnan(value_N[f"{name}_confidence"]).all():
                continue  # nobody was asked
            for row in np.unique(row_N):
                own = row_N == row
                told, true = self._spans(choice_N[own]), self._spans(label_N[own])
                domain = domain_N[own][0]
                self.words_MG[model, domain] += own.sum()
                for place, spans in enumerate((told & true, told, true)):
                    for kind, *_ in spans:
                        self.spans_MGY3[model, domain, self.types.index(kind), place] += 1

    def sum_over(self, ranks: Ranks) -> None:
        """Make the counts those of all ranks."""
        self.spans_MGY3, self.words_MG = map(ranks.sum, (self.spans_MGY3, self.words_MG))

    def _spans(self, number_N: np.ndarray) -> set[tuple[str, int, int]]:
        """Type, first and last word of each span."""
        return set(get_entities([self.tags[int(number)] for number in number_N]))

    def scores(self) -> list[tuple[TagScores | None, ...]]:
        """By domain, of each of `MODELS`; None of one that did not say."""
        return [
            tuple(
                tag_scores(spans_Y3, self.types) if said else None
                for spans_Y3, said in zip(self.spans_MGY3[:, g], self.words_MG[:, g], strict=True)
            )
            for g in range(self.num_domains)
        ]


def tag_scores(spans_Y3: np.ndarray, types: list[str]) -> TagScores:
    """From counts of spans by type, micro-averaged as seqeval does."""
    whole = _score(spans_Y3.sum(0))
    by_type = {
        name: _score(spans_3) for name, spans_3 in zip(types, spans_Y3, strict=True) if any(spans_3)
    }
    return TagScores(whole.span_f1, whole.precision, whole.recall, by_type)


def _score(spans_3: np.ndarray) -> SpanScores:
    right, told, true = spans_3.tolist()
    both = told + true
    return SpanScores(2 * right / both if both else 0.0, right / max(told, 1), right / max(true, 1))


def evaluate_tags(run: "Run", *, tags: tuple[str, ...]) -> Evaluation:
    """As a language model's, a word being a token, and how well entities are found."""
    return evaluate_labelled(run, SpanSums(len(run.config.domains), tags))

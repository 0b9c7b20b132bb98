"""How well classes are told apart: accuracy, F1 and calibration of student and teacher by domain.

N rows of a unit   G domains in config order   C classes   M models: student, teacher   B bins
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from shared.data.rows import Rows
from shared.run.document_sums import NUM_BINS, bins
from shared.run.metrics import ClassScores, TagScores
from student_trainer.evaluation.costs import Cost, costs_of
from student_trainer.evaluation.documents import DocumentAccumulator
from student_trainer.evaluation.labelled import MODELS, evaluate_labelled
from student_trainer.objective import MEASURED
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run


@dataclass(slots=True)
class ClassSums:
    """Counts over rows, of this rank."""

    num_domains: int
    num_classes: int
    documents: DocumentAccumulator = field(default_factory=DocumentAccumulator)
    confusion_MGCC: np.ndarray = field(init=False)  # rows of a class, by what is chosen for them
    gap_MGB: np.ndarray = field(init=False)  # right choices less their probabilities

    def __post_init__(self) -> None:
        shape = (len(MODELS), self.num_domains)
        self.confusion_MGCC = np.zeros((*shape, self.num_classes, self.num_classes))
        self.gap_MGB = np.zeros((*shape, NUM_BINS))

    def add(self, rows: Rows, batch: Batch, measured_8N: Tensor) -> None:
        """Add a unit, as a `DocumentAccumulator` does."""
        self.documents.add(rows, batch, measured_8N)
        value_N: dict[str, np.ndarray] = dict(zip(MEASURED, measured_8N.cpu().numpy(), strict=True))
        domain_N, label_N = (batch[name].cpu().numpy() for name in ("domain_N", "label_N"))
        for place, model in enumerate(MODELS):
            confidence_N = value_N[f"{model}_confidence"]
            is_missing_N = np.isnan(confidence_N)
            if model == "teacher" and is_missing_N.all():
                continue  # nobody was asked
            confidence_N = np.where(is_missing_N, 0.0, confidence_N)
            choice_N = np.nan_to_num(value_N[f"{model}_choice"]).astype(np.int64)
            np.add.at(self.confusion_MGCC[place], (domain_N, label_N, choice_N), 1)
            gap_N = np.nan_to_num(value_N[f"{model}_right"]) - confidence_N
            np.add.at(self.gap_MGB[place], (domain_N, bins(confidence_N)), gap_N)

    def sum_over(self, ranks: Ranks) -> None:
        """Make the counts those of all ranks."""
        self.confusion_MGCC, self.gap_MGB = map(ranks.sum, (self.confusion_MGCC, self.gap_MGB))

    def scores(self) -> list[tuple[ClassScores | None, ...]]:
        """By domain, of each of `MODELS`; None of one that did not say."""
        return [
            tuple(
                scores_of(self.confusion_MGCC[model, domain], self.gap_MGB[model, domain])
                for model in range(len(MODELS))
            )
            for domain in range(self.num_domains)
        ]


def scores_of(confusion_CC: np.ndarray, gap_B: np.ndarray) -> ClassScores | None:
    """From rows of each class by what is chosen for them; None without any row.

    F1 is the mean over the classes that a row has or is said to have, as scikit-learn's is. The
    calibration error is that of Guo et al., 2017: the sum over bins of |right - probability| over
    all rows.
    """
    count = confusion_CC.sum()
    if not count:
        return None
    right_C = confusion_CC.diagonal()
    both_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    present_C = both_C > 0
    return ClassScores(
        accuracy=float(right_C.sum() / count),
        macro_f1=float((2 * right_C[present_C] / both_C[present_C]).mean()),
        calibration_error=float(np.abs(gap_B).sum() / count),
    )


def evaluate_classes(run: "Run", *, num_classes: int) -> Evaluation:
    """As a language model's, a row being a token, and how well classes are told apart, by models of
    which weights, in what time."""
    measured = evaluate_labelled(run, ClassSums(len(run.config.domains), num_classes))
    domains = {
        name: replace(
            domain,
            student_scores=_with(domain.student_scores, student),
            teacher_scores=_with(domain.teacher_scores, teacher),
        )
        for (name, domain), (student, teacher) in zip(
            measured.domains.items(), costs_of(run), strict=True
        )
    }
    return replace(measured, domains=domains)


def _with(scores: ClassScores | TagScores | None, cost: Cost) -> ClassScores | None:
    if scores is None:
        return None
    assert isinstance(scores, ClassScores), "they are of classes"
    return replace(scores, weights=cost.weights, row_ms=cost.row_ms)

"""How well classes are told apart: accuracy, F1 and calibration of student and teacher by domain.

N rows of a unit   G domains in config order   C classes   M models: student, teacher   B bins
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from shared.data.rows import Rows
from shared.run.document_sums import NUM_BINS, bins
from shared.run.metrics import ClassScores
from student_trainer.evaluation.costs import Cost, costs_of
from student_trainer.evaluation.documents import DocumentAccumulator
from student_trainer.objective import MEASURED
from student_trainer.sources.batches import Batch
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run

MODELS = ("student", "teacher")


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


def _with(scores: ClassScores | None, cost: Cost) -> ClassScores | None:
    return scores and replace(scores, weights=cost.weights, row_ms=cost.row_ms)


def evaluate_classes(run: "Run", *, num_classes: int) -> Evaluation:
    """Nats per row of student and teacher, KL(teacher || student), and how well both tell classes
    apart; all ranks together."""
    question, domains = run.plan.validation_question, tuple(run.config.domains)
    found = ClassSums(len(domains), num_classes)
    sums = run.validation.sums(run.engine, run.reader, question, documents=found)
    found.confusion_MGCC, found.gap_MGB = (
        run.ranks.sum(part) for part in (found.confusion_MGCC, found.gap_MGB)
    )
    compared = run.reader is not None and question is not None
    kinds = {name: run.plan.kl_kind_of(name) if compared else "none" for name in domains}
    scored = zip(sums.evaluations(kinds).items(), found.scores(), costs_of(run), strict=True)
    evaluations = {
        name: replace(
            measured,
            **{f"{m}_scores": _with(s, c) for m, s, c in zip(MODELS, scores, costs, strict=True)},
        )
        for (name, measured), scores, costs in scored
    }
    return Evaluation(evaluations, found.documents.joined(run.ranks, domains))

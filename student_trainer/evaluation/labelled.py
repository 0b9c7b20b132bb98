"""What a student with a head over labels is measured by on validation text, all ranks together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from shared.run.metrics import ClassScores, TagScores
from student_trainer.evaluation.documents import DocumentAccumulator
from student_trainer.evaluation.validation import Measuring
from student_trainer.ranks import Ranks
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run

MODELS = ("student", "teacher")


class LabelSums(Measuring, Protocol):
    """Counts of what is told of rows, of this rank until they are summed."""

    @property
    def documents(self) -> DocumentAccumulator:
        """What is added up beside."""
        ...

    def sum_over(self, ranks: Ranks) -> None:
        """Make the counts those of all ranks."""
        ...

    def scores(self) -> Sequence[Sequence[ClassScores | TagScores | None]]:
        """By domain, of each of `MODELS`; None of one that did not say."""
        ...


def evaluate_labelled(run: "Run", found: LabelSums) -> Evaluation:
    """Nats per label of student and teacher, KL(teacher || student), and the scores of both."""
    question, domains = run.plan.validation_question, tuple(run.config.domains)
    sums = run.validation.sums(run.engine, run.reader, question, documents=found)
    found.sum_over(run.ranks)
    compared = run.reader is not None and question is not None
    kinds = {name: run.plan.kl_kind_of(name) if compared else "none" for name in domains}
    scored = zip(sums.evaluations(kinds).items(), found.scores(), strict=True)
    evaluations = {
        name: replace(measured, student_scores=student, teacher_scores=teacher)
        for (name, measured), (student, teacher) in scored
    }
    return Evaluation(evaluations, found.documents.joined(run.ranks, domains))

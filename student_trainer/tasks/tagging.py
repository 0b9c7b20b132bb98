"""Tagging of words as a task: the first token of every word predicts its tag.

R rows   N words of a unit
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from shared.targets.paired import PairedTargets
from student_trainer.tasks.labelled import Labelled, lines
from student_trainer.tasks.task import Evaluation, ModelKind, Pairing

if TYPE_CHECKING:
    from student_trainer.run import Run


@dataclass(frozen=True, slots=True)
class WordPairing:
    """Satisfies `Pairing`: the teacher reads a document for each word of a row, in their order."""

    def arrays(self, rows: Rows, layout: Layout, answer: PairedTargets) -> dict[str, np.ndarray]:
        """See `Pairing`."""
        from student_trainer.answers import answer_arrays  # slow, as torch is

        return answer_arrays(answer.targets)


@dataclass(frozen=True, slots=True)
class Tagging(Labelled):
    """Learns the teacher's distribution over the tags of each word; a `Task`."""

    @property
    def model(self) -> ModelKind:
        """A token classifier."""
        return ModelKind("AutoModelForTokenClassification", "TOKEN_CLS", self.labels)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A line for each row's text, with the tag of each word as the label of its first token."""
        all_ids, masks = rows.column("input_ids"), rows.column("loss_mask")
        words_R = np.array([int(mask.sum()) for mask in masks], np.int64)
        length_R = np.array([len(ids) for ids in all_ids], np.int64) - words_R
        nothing = [np.zeros(0, np.int64)]
        tags = [ids[length:] for ids, length in zip(all_ids, length_R, strict=True)]
        return lines(
            all_ids,
            length_R,
            row_N=np.repeat(np.arange(len(rows)), words_R),
            at_N=np.concatenate([*nothing, *map(np.flatnonzero, masks)]),
            label_N=np.concatenate([*nothing, *tags]).astype(np.int64),
        )

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """Word by word; None without a teacher that reads rows of its own."""
        has_own = any(domain.teacher_paths is not None for domain in plan.domains)
        return WordPairing() if has_own else None

    def evaluate(self, run: "Run") -> Evaluation:
        """As a language model's, a word being a token, and F1 of whole entities."""
        from student_trainer.evaluation.tags import evaluate_tags  # slow, as torch is

        return evaluate_tags(run, tags=self.labels)

"""Classification of whole texts as a task: every row predicts its class.

R rows   C classes
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from student_trainer.tasks.labelled import Labelled, lines
from student_trainer.tasks.task import Evaluation, ModelKind, Pairing

if TYPE_CHECKING:
    from student_trainer.run import Run


@dataclass(frozen=True, slots=True)
class Classification(Labelled):
    """Learns the teacher's distribution over the classes of a text; a `Task`."""

    @property
    def model(self) -> ModelKind:
        """A sequence classifier."""
        return ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", self.labels)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A line for each row, with its class as the label of its last token."""
        all_ids, masks = rows.column("input_ids"), rows.column("loss_mask")
        last_R = np.array([int(mask.argmax()) for mask in masks], np.int64)
        label_R = np.array(
            [ids[last + 1] for ids, last in zip(all_ids, last_R, strict=True)], np.int64
        )
        row_R = np.arange(len(rows))
        return lines(all_ids, last_R + 1, row_N=row_R, at_N=last_R, label_N=label_R)

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """None: what the teacher reads of a text stands in place of it, and one row has one
        answer."""
        return None

    def evaluate(self, run: "Run") -> Evaluation:
        """As a language model's, a row being a token, and the scores of a classifier."""
        from student_trainer.evaluation.classes import evaluate_classes  # slow, as torch is

        return evaluate_classes(run, num_classes=len(self.labels))

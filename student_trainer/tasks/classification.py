"""Classification of whole texts as a task: every row predicts its class.

R rows   B lines   T tokens   C classes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.config.run import Config
from shared.data.layout import PAD_ID, Layout, padded_length
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.data.trust import Trust
from shared.run.plan import RunPlan
from student_trainer.tasks.task import Evaluation, ModelKind, Pairing, Side

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student
    from student_trainer.run import Run


@dataclass(frozen=True, slots=True)
class Classification:
    """Learns the teacher's distribution over the classes of a text; a `Task`."""

    labels: tuple[str, ...]

    @property
    def model(self) -> ModelKind:
        """See `Task`."""
        return ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", self.labels)

    def agree(self, teacher: Side, student: Side, *, chat_rows: bool) -> int:
        """They share the classes; each reads rows by its own tokenizer."""
        return len(self.labels)

    def trust(self, config: Config) -> Trust:
        """Each row by itself, on a model that is tried."""
        from student_trainer.models.classifier import classifier_trust  # slow, as torch is

        return classifier_trust(config, self.model)

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """A sequence classifier."""
        from student_trainer.models.classifier import load_classifier  # slow, as torch is

        return load_classifier(config, self.model, device=device, export=export)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A line for each row, with its class as the label of its last token; an empty unit is a
        line of padding."""
        all_ids, masks = rows.column("input_ids"), rows.column("loss_mask")
        last_R = np.array([int(mask.argmax()) for mask in masks], np.int64)
        length_R = last_R + 1
        width = padded_length(int(length_R.max(initial=0)))
        lines = max(1, len(rows))
        ids_BT = np.full((lines, width), PAD_ID, np.int64)
        for line, (ids, length) in enumerate(zip(all_ids, length_R, strict=True)):
            ids_BT[line, :length] = ids[:length]
        length_B = np.zeros(lines, np.int64)
        length_B[: len(rows)] = length_R
        row_R = np.arange(len(rows))
        return Layout(
            input_ids_BT=ids_BT,
            position_ids_BT=np.tile(np.arange(width), (lines, 1)),
            length_B=length_B,
            loss_index_N=row_R * width + last_R,
            label_N=np.array([ids[n] for ids, n in zip(all_ids, length_R, strict=True)], np.int64),
            row_N=row_R,
            document_N=row_R,
            pass_B=np.zeros(lines, np.int64),
            width_P=np.array([width]),
        )

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """None: what the teacher reads of a text stands in place of it, and one row has one
        answer."""
        return None

    def evaluate(self, run: "Run") -> Evaluation:
        """As a language model's, a row being a token, and the scores of a classifier."""
        from student_trainer.evaluation.classes import evaluate_classes  # slow, as torch is

        return evaluate_classes(run, num_classes=len(self.labels))

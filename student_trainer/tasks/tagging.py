"""Tagging of words as a task: the first token of every word predicts its tag.

R rows   B lines   T tokens   N words of a unit
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
from shared.targets.paired import PairedTargets
from student_trainer.tasks.task import Evaluation, ModelKind, Pairing, Side

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student
    from student_trainer.run import Run


@dataclass(frozen=True, slots=True)
class WordPairing:
    """Satisfies `Pairing`: the teacher reads a document for each word of a row, in their order."""

    def arrays(self, rows: Rows, layout: Layout, answer: PairedTargets) -> dict[str, np.ndarray]:
        """See `Pairing`."""
        from student_trainer.answers import answer_arrays  # slow, as torch is

        return answer_arrays(answer.targets)


@dataclass(frozen=True, slots=True)
class Tagging:
    """Learns the teacher's distribution over the tags of each word; a `Task`."""

    labels: tuple[str, ...]

    @property
    def model(self) -> ModelKind:
        """See `Task`."""
        return ModelKind("AutoModelForTokenClassification", "TOKEN_CLS", self.labels)

    def agree(self, teacher: Side, student: Side, *, chat_rows: bool) -> int:
        """They share the tags; each reads rows by its own tokenizer."""
        return len(self.labels)

    def trust(self, config: Config) -> Trust:
        """Each row by itself, on a model that is tried."""
        from student_trainer.models.classifier import classifier_trust  # slow, as torch is

        return classifier_trust(config, self.model)

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """A token classifier."""
        from student_trainer.models.classifier import load_classifier  # slow, as torch is

        return load_classifier(config, self.model, device=device, export=export)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A line for each row's text, with the tag of each word as the label of its first token;
        an empty unit is a line of padding."""
        all_ids, masks = rows.column("input_ids"), rows.column("loss_mask")
        words_R = np.array([int(mask.sum()) for mask in masks], np.int64)
        length_R = np.array([len(ids) for ids in all_ids], np.int64) - words_R
        width = padded_length(int(length_R.max(initial=0)))
        lines = max(1, len(rows))
        ids_BT = np.full((lines, width), PAD_ID, np.int64)
        for line, (ids, length) in enumerate(zip(all_ids, length_R, strict=True)):
            ids_BT[line, :length] = ids[:length]
        length_B = np.zeros(lines, np.int64)
        length_B[: len(rows)] = length_R
        row_N = np.repeat(np.arange(len(rows)), words_R)
        nothing = [np.zeros(0, np.int64)]
        at_N = np.concatenate([*nothing, *map(np.flatnonzero, masks)])
        tags = [ids[length:] for ids, length in zip(all_ids, length_R, strict=True)]
        return Layout(
            input_ids_BT=ids_BT,
            position_ids_BT=np.tile(np.arange(width), (lines, 1)),
            length_B=length_B,
            loss_index_N=row_N * width + at_N,
            label_N=np.concatenate([*nothing, *tags]).astype(np.int64),
            row_N=row_N,
            document_N=row_N,
            pass_B=np.zeros(lines, np.int64),
            width_P=np.array([width]),
        )

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """Word by word; None without a teacher that reads rows of its own."""
        has_own = any(domain.teacher_paths is not None for domain in plan.domains)
        return WordPairing() if has_own else None

    def evaluate(self, run: "Run") -> Evaluation:
        """As a language model's, a word being a token, and F1 of whole entities."""
        from student_trainer.evaluation.tags import evaluate_tags  # slow, as torch is

        return evaluate_tags(run, tags=self.labels)

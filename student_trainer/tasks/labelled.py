"""What tasks share whose student has a head over labels of their own: rows as lines that are read
each by itself.

R rows   B lines   T tokens   N positions with a label
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.config.run import Config
from shared.data.layout import PAD_ID, Layout, padded_length
from shared.data.rows import Rows
from shared.data.trust import Trust
from student_trainer.tasks.task import ModelKind, Side

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student


@dataclass(frozen=True, slots=True)
class Labelled(ABC):
    """A `Task` but for its rows, its pairs and its scores."""

    labels: tuple[str, ...]

    @property
    @abstractmethod
    def model(self) -> ModelKind:
        """See `Task`."""

    def agree(self, teacher: Side, student: Side, *, chat_rows: bool) -> int:
        """They share the labels; each reads rows by its own tokenizer."""
        return len(self.labels)

    def trust(self, config: Config) -> Trust:
        """Each row by itself, on a model that is tried."""
        from student_trainer.models.classifier import classifier_trust  # slow, as torch is

        return classifier_trust(config, self.model)

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """A classifier of `model`'s kind."""
        from student_trainer.models.classifier import load_classifier  # slow, as torch is

        return load_classifier(config, self.model, device=device, export=export)

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}


def lines(
    ids_R: Sequence[np.ndarray],
    length_R: np.ndarray,
    *,
    row_N: np.ndarray,
    at_N: np.ndarray,
    label_N: np.ndarray,
) -> Layout:
    """A line for the first `length_R` tokens of each row, with labels at `at_N` of the rows
    `row_N`; without rows, a line of padding."""
    width = padded_length(int(length_R.max(initial=0)))
    num_lines = max(1, len(ids_R))
    ids_BT = np.full((num_lines, width), PAD_ID, np.int64)
    for line, (ids, length) in enumerate(zip(ids_R, length_R, strict=True)):
        ids_BT[line, :length] = ids[:length]
    length_B = np.zeros(num_lines, np.int64)
    length_B[: len(ids_R)] = length_R
    return Layout(
        input_ids_BT=ids_BT,
        position_ids_BT=np.tile(np.arange(width), (num_lines, 1)),
        length_B=length_B,
        loss_index_N=row_N * width + at_N,
        label_N=label_N,
        row_N=row_N,
        document_N=row_N,
        pass_B=np.zeros(num_lines, np.int64),
        width_P=np.array([width]),
    )

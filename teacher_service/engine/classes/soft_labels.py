"""SoftLabelEngine: answers about every row with the soft label of its class.

P rows   C classes
"""

from dataclasses import dataclass

import numpy as np

from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets.asks.classes import SoftLabels
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.classes.texts import class_columns, labels_of
from teacher_service.engine.description import TeacherDescription

NO_MODEL = "a teacher with engine similarity has no model"


@dataclass(frozen=True, slots=True)
class SoftLabelEngine:
    """An `Engine` without a model."""

    classes: tuple[str, ...]
    label_CC: np.ndarray  # probabilities, a row for each class
    fingerprint: dict[str, str]

    def describe(self) -> TeacherDescription:
        """See `Engine`."""
        return TeacherDescription(
            fingerprint=self.fingerprint,
            vocab_rows=0,
            num_layers=0,
            hidden_width=0,
            state_widths=(),
            max_context=None,
            packed=False,
            watched=False,
        )

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`."""
        if question.ask != SoftLabels(self.classes):
            raise ConfigError(
                f"{NO_MODEL} and soft labels of {', '.join(self.classes):.200}, and is asked about "
                f"{question.ask.in_words()}; set task=classification, with these classes"
            )
        logprob_PC = np.log(self.label_CC)[labels_of(rows)].astype(np.float32)
        return SoftTargets.build(
            question=question,
            teacher=self.fingerprint,
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=class_columns(rows, logprob_PC),
        )

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`."""
        raise ConfigError(f"{NO_MODEL}, which could write; name a causal language model")

    def ship_head(self) -> ShippedHead:
        """See `Engine`."""
        raise ConfigError(f"{NO_MODEL}, whose head could be shipped; leave targets.exact out")

"""What a student is trained to do, behind one protocol.

Modules of tasks import torch and transformers late: the driver asks them for a handshake too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shared.config.run import Config
from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.data.trust import Trust
from shared.run.document_sums import DocumentSums
from shared.run.metrics import DomainEvaluation
from shared.run.plan import RunPlan
from shared.targets.paired import PairedTargets
from shared.text.tokenizers import TokenizerIdentity

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student
    from student_trainer.run import Run


PIXELS = "pixels."  # before the names of what is read beside token ids, in a batch


@dataclass(frozen=True, slots=True)
class ModelKind:
    """Names under which other libraries know a task's models."""

    auto_class: str  # of transformers; loads the student, and its export
    peft_task: str  # of peft's `TaskType`; stands in an adapter's config
    labels: tuple[str, ...] = ()  # of a classifier of texts, in the order of its outputs
    sees: bool = False  # whether it reads images beside text


@dataclass(frozen=True, slots=True)
class Side:
    """One model of a handshake."""

    name: str  # as the config has it
    tokens: TokenizerIdentity
    rows: int  # of its embedding


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a student does on validation text."""

    domains: dict[str, DomainEvaluation]  # in config order
    documents: DocumentSums | None = None  # None: the task has none to tell


class Pairing(Protocol):
    """How an answer about rows of the teacher's own becomes arrays of the student's unit."""

    def arrays(self, rows: Rows, layout: Layout, answer: PairedTargets) -> dict[str, np.ndarray]:
        """Arrays beside those of the unit `rows`, laid out as `layout`, by their names in a batch;
        those whose shape begins with N have an entry for each of its positions with loss."""
        ...


class Task(Protocol):
    """What decides labels, models, agreement with the teacher, and measures of a run."""

    @property
    def model(self) -> ModelKind:
        """What a student is loaded and exported as."""
        ...

    def agree(self, teacher: Side, student: Side, *, chat_rows: bool) -> int:
        """How many ids the teacher answers about. `chat_rows` says whether rows pass through a
        chat template. Raises HandshakeError where this student cannot learn from this teacher."""
        ...

    def trust(self, config: Config) -> Trust:
        """What units of the student of a config are trusted for. Raises ConfigError for a student
        that cannot be trained as asked."""
        ...

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """The student of a config, adapted and ready to train, or that in an exported folder.
        Raises ConfigError."""
        ...

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """The padded batch of a unit, with the label of every position with loss."""
        ...

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """What the student reads of a unit beside what `lay_out` gives, by its names in a batch."""
        ...

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """What pairs the teacher's rows with the student's; None where it reads the student's."""
        ...

    def evaluate(self, run: "Run") -> Evaluation:
        """What the student does on validation text; all ranks together."""
        ...

"""PreparedDomain: a domain whose text lies on disk as rows, ready to be drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.text.sources import Split


@dataclass(frozen=True, slots=True)
class PreparedDomain:
    """Where a domain's tokenised rows lie (Arrow files of `shared.data.rows.SCHEMA`)."""

    name: str
    train_path: str
    validation_path: str
    num_rows: int  # training rows
    num_loss_tokens: int  # in the training rows
    natural_weight: float  # share of the corpus's loss tokens
    order_path: str | None = None  # rows from easy to difficult; None: no phases
    fills_path: str | None = None  # what a teacher put into masks of the rows; None: nothing
    # Rows that the teacher reads in place of these, row by row; None: it reads these.
    teacher_paths: Mapping[Split, str] | None = None

    @property
    def paths(self) -> Mapping[Split, str]:
        """The student's rows."""
        return {"train": self.train_path, "validation": self.validation_path}

    @property
    def read_by_teacher(self) -> Mapping[Split, str]:
        """The rows that the teacher reads."""
        return self.teacher_paths or self.paths

"""Ask: a kind of answer that a teacher gives about every position of a row.

A class owns what its answers are: their columns, what they decode to, their price, their words, and
the fields under which a question lies in stores. Beside it, a teacher knows how to answer it
(`teacher_service.scoring.answering`) and a student how its losses read it
(`student_trainer.answers`). Every answer holds the label's log-probability, too.

N positions with loss
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np

from shared.targets.codec.columns import Column, Columns

IdsEncoding = Literal["elias_fano", "plain"]
Arrays = dict[str, np.ndarray]

ROUNDING = 1e-6  # of a mass
MASSES = "masses and label"  # what the label's log-probability is counted with


class Ask(ABC):
    """What is asked about every position of a row. Subclasses are frozen dataclasses, so that equal
    ones ask the same."""

    selector: ClassVar[str]  # its name in stores
    holds: ClassVar[tuple[str, ...]]  # what its bytes are counted as, in the order of a sentence
    # Whether a loss of its answers is right on average over draws alone.
    is_estimate: ClassVar[bool] = False
    # Whether a teacher reads the documents of a row one by one, whatever the row's length.
    reads_documents: ClassVar[bool] = False
    shared_vocab: int  # ids both tokenizers know; the answers are about these

    @property
    def with_entropy(self) -> bool:
        """Whether answers hold the entropy of the teacher's distribution."""
        return False

    @property
    def is_bulky(self) -> bool:
        """Whether answers are so large that they travel one row at a time."""
        return False

    @property
    def is_rounded(self) -> bool:
        """Whether the wire takes more precision than a test of 16 bits would notice."""
        return False

    def exact(self) -> "Ask":
        """An ask of about the same size whose answers are no estimates."""
        return self

    def without_student(self) -> "Ask":
        """The same of a teacher to whom no student names ids."""
        return self

    def num_draws(self, configured: int) -> int:
        """Draws of a row that take turns from epoch to epoch, if any are `configured`."""
        return 1

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """What its columns hold, in the order of a Table."""

    @abstractmethod
    def decode(self, columns: Columns) -> Arrays:
        """Arrays by the names that a batch has for them."""

    def rewritten(self, columns: Columns, ids: IdsEncoding) -> tuple["Ask", Arrays]:
        """The ask whose answers have their ids written as `ids` says, and the columns that differ;
        nothing is lost."""
        return self, {}

    @abstractmethod
    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        """The teacher's mass at each position that the answers hold without an estimate [N]."""

    def mass_is_sound(self, mass: float) -> bool:
        """Whether answers may hold this much of the teacher's mass in the mean."""
        return 0 < mass <= 1 + ROUNDING

    def miss_of_weights(self, arrays: Arrays) -> float:
        """By how much the weights of a position miss 1 at most; 0 where there are none."""
        return 0.0

    @abstractmethod
    def mass_in_words(self, mass: float) -> str:
        """How much of the teacher's mass answers hold, said."""

    @abstractmethod
    def in_words(self) -> str:
        """The ask as a message names it."""

    @abstractmethod
    def stored(self) -> dict[str, Any]:
        """Its fields under their names in stores, where `question.STORED` has others."""

    @classmethod
    @abstractmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `stored`, also after a trip through JSON."""


def listed(values: tuple[float, ...]) -> str:
    """Numbers as a message names them."""
    return ", ".join(f"{value:g}" for value in values)

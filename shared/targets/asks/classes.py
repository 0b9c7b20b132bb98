"""Answers that hold how likely each of a few classes is: of a causal language model, of a sequence
classifier, and of nobody but the rows' own classes.

N rows, of which each has one position   C classes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from shared.targets.asks.ask import MASSES, Arrays, Ask
from shared.targets.codec.columns import Column, Columns

COLUMN, CLASSES = "class_logprobs", "classes"
Tokens = tuple[int, ...]


class ClassAsk(Ask):
    """Log-probabilities of the classes, normalised among themselves; the student's outputs are
    these classes."""

    holds: ClassVar = (CLASSES, MASSES)
    array: ClassVar[str] = "class_logprobs_NC"  # what a batch calls them
    classes: tuple[Any, ...]

    @property
    def shared_vocab(self) -> int:  # type: ignore[override]
        """C."""
        return len(self.classes)

    def columns(self) -> dict[str, Column]:
        """See `Ask`."""
        return {COLUMN: Column(pa.list_(pa.float32(), len(self.classes)), CLASSES)}

    def decode(self, columns: Columns) -> Arrays:
        """See `Ask`."""
        return {self.array: columns.matrix(COLUMN)}

    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        """See `Ask`."""
        return np.exp(arrays[self.array]).sum(axis=1)

    def mass_in_words(self, mass: float) -> str:
        """See `Ask`."""
        return f"{len(self.classes)} classes hold {mass:.1%}"

    def in_words(self) -> str:
        """See `Ask`."""
        return f"{len(self.classes)} classes"

    def stored(self) -> dict[str, Any]:
        """See `Ask`."""
        named = {"selector": self.selector, "shared_vocab": self.shared_vocab}
        return {**named, "classes": self.classes}


@dataclass(frozen=True, slots=True)
class ClassLogProbs(ClassAsk):
    """What a causal language model says.

    A class is what the teacher would write for it after a row's text, token by token:

        log P(c | x) = log softmax over c of sum over i of log p(t_ci | x, t_c1 .. t_c,i-1)

    with a `content_free` text the sum at it is taken off before the softmax (Zhao et al., arXiv
    2102.09690): what the teacher would say whatever the text.
    """

    classes: tuple[Tokens, ...]  # the teacher's token ids of each
    content_free: Tokens = ()  # token ids of a text without content; empty: not calibrated

    selector: ClassVar = "classes"
    reads_documents: ClassVar = True

    def in_words(self) -> str:
        """See `Ask`."""
        return f"{len(self.classes)} classes" + ", calibrated" * bool(self.content_free)

    def stored(self) -> dict[str, Any]:
        """See `Ask`."""
        return ClassAsk.stored(self) | {"content_free": self.content_free}

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "ClassLogProbs":
        """See `Ask`."""
        return cls(tuple(map(tuple, fields["classes"])), tuple(fields["content_free"]))


@dataclass(frozen=True, slots=True)
class HeadLogProbs(ClassAsk):
    """What a classifier says: the log-softmax of its outputs, in the order asked for."""

    classes: tuple[str, ...]  # as its config names them

    selector: ClassVar = "class_head"

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "HeadLogProbs":
        """See `Ask`."""
        return cls(tuple(fields["classes"]))


@dataclass(frozen=True, slots=True)
class SoftLabels(ClassAsk):
    """Soft labels: the same distribution for every row of a class, which no temperature changes
    (ReffAKD, arXiv 2404.09886)."""

    classes: tuple[str, ...]

    selector: ClassVar = "soft_labels"
    array: ClassVar = "soft_labels_NC"

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "SoftLabels":
        """See `Ask`."""
        return cls(tuple(fields["classes"]))

"""What a loss on log-probabilities is: a term, which says what it needs and gives its values.

A term is made from a loss section of the config, whose fields it reads by name, so that this
package needs torch alone.

n positions of a chunk   K ids kept per position
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from student_trainer.losses.across.spans import Spans
from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.kernel.labelled import LabelledBuckets

Pairs = Callable[[float], tuple[Buckets, Buckets]]  # temperature -> teacher, student of a chunk


@dataclass(frozen=True, slots=True)
class Needs:
    """What a term reads of a chunk beside the student's log-probability of the label."""

    temperatures: tuple[float, ...] = ()  # of both models' buckets
    label_apart: bool = False  # the label told from the tail, at temperature 1
    columns: tuple[str, ...] = ()  # values per position that a weigher forms of the step
    text: bool = False  # the label to be of the data set: 0 where the student wrote it

    @property
    def teacher(self) -> bool:
        """Whether it compares with the teacher's ids."""
        return bool(self.temperatures) or self.label_apart


@dataclass(frozen=True, slots=True)
class ChunkView:
    """A chunk as terms see it."""

    label_logprob_n: Tensor  # the student's at temperature 1, nats
    pair: Pairs  # teacher and student at a temperature, over the same kept ids and tail
    # Teacher and student at temperature 1 with the label on its own, where a term needs it.
    labelled: tuple[LabelledBuckets, LabelledBuckets] | None
    columns: Mapping[str, Tensor]  # name -> [n]
    moving: Mapping[str, float]  # what moves from step to step, by name
    spans: Spans | None = None  # of several tokens, where the tokenizers differ

    def compared(
        self, of: Callable[[Buckets, Buckets], Tensor], temperature: float, *, scale: float = 1.0
    ) -> Tensor:
        """A divergence of both models' next tokens at a temperature, times `scale`, and of spans at
        1 [n]."""
        value_n = of(*self.pair(temperature)) * scale
        if self.spans is None:
            return value_n
        return value_n + self.spans.value(of, self.label_logprob_n)


@dataclass(frozen=True, slots=True)
class TermValues:
    """A term's values of a chunk [n], unweighted, and what it reports beside them, by name."""

    values_n: Tensor
    reports: Mapping[str, Tensor] = field(default_factory=dict)  # `Term.reported` -> [n]


class Term(Protocol):
    """A loss per position on log-probabilities, unweighted, without mask or mean."""

    reported: ClassVar[tuple[str, ...]]  # names of what it reports, fields of `DomainMetrics`

    @property
    def weight(self) -> float:
        """What its values count in the sum of all terms."""
        ...

    @property
    def needs(self) -> Needs:
        """What it reads."""
        ...

    @property
    def is_kl_at(self) -> float | None:
        """A temperature at which its values are KL(teacher || student), so that they are reported
        as such; None: at none."""
        ...

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """Its values, differentiable in the student's log-probabilities, and its reports."""
        ...

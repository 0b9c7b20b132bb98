"""Proof of a capture: some of its rows scored again, every document alone.

N positions with loss
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import HandshakeError
from shared.store.target_store import TargetStore
from shared.targets.question import Question
from shared.targets.reader import TargetReader, answered

# Nats of a label's log-probability that rounding may make on average, by the teacher's dtype, and
# that rows of an int8 teacher may change about each other.
ALLOWED_MEAN = {"float32": 1e-3, "bfloat16": 0.1}
INT8_ALLOWED_MEAN = 0.5
AHEAD = 2  # documents asked beyond the one waited for


@dataclass(slots=True)
class Widest:
    """Units as they come; remembers the one whose documents differ most in length, where what
    depends on neighbours shows."""

    units: Iterable[Rows]
    unit: Rows | None = None
    spread: float = 0.0

    def __iter__(self) -> Iterator[Rows]:
        for rows in self.units:
            starts, ids = rows.column("doc_starts"), rows.column("input_ids")
            pairs = zip(starts, ids, strict=True)
            lengths = np.concatenate([np.diff([*first, len(row)]) for first, row in pairs])
            spread = float(lengths.max() / max(lengths.min(), 1))
            if spread > self.spread:
                self.unit, self.spread = rows, spread
            yield rows


@dataclass(frozen=True, slots=True)
class Again:
    """How far labels' log-probabilities of documents that are scored alone are from the stored."""

    largest: float = 0.0  # nats
    mean: float = 0.0  # nats, of the unit where it is largest
    in_int8: bool = False  # the teacher's products, which rows of a unit share

    def with_unit(
        self, unit: Rows | None, store: TargetStore, reader: TargetReader, question: Question
    ) -> "Again":
        """The same with a stored unit compared."""
        if unit is None:
            return self
        documents = unit.documents()
        single = [documents.part(slice(row, row + 1)) for row in range(len(documents))]
        alone = answered(reader, filter(_has_loss, single), question, ahead=AHEAD)
        parts = [answer.arrays().label_logprob_N for _, answer in alone]
        stored_N = store.read(unit).arrays().label_logprob_N
        off_N = np.abs(np.concatenate([np.zeros(0), *parts]) - stored_N)
        mean = float(off_N.sum() / max(len(off_N), 1))
        largest = max(self.largest, float(off_N.max(initial=0.0)))
        return replace(self, largest=largest, mean=max(self.mean, mean))

    def in_words(self) -> str:
        """For the terminal."""
        return (
            "log-probabilities scored again, every document alone, differ by at most "
            f"{self.largest:.1g} nats, by {self.mean:.1g} on average"
        )


def refuse_unsound(teachers: Mapping[str, Teacher], found: Mapping[str, Again]) -> None:
    """Raise HandshakeError where a teacher's answers depend on what shared their batch."""
    for name, again in found.items():
        teacher = teachers[name]
        allowed = INT8_ALLOWED_MEAN if again.in_int8 else ALLOWED_MEAN[teacher.dtype]
        if not again.mean <= allowed:
            raise HandshakeError(
                f"the answers of teacher {name} depend on what shares a batch: scored alone, "
                f"documents differ by {again.mean:.2g} nats on average, where rounding makes "
                f"{allowed:g} at most; what was answered is stored, but do not learn from it: set "
                f"teachers.{name}.dtype=float32, or use another teacher"
            )


def _has_loss(rows: Rows) -> bool:
    return bool(rows.num_loss_tokens().sum())

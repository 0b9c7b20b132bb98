"""Answers that hold some ids of a position: the most likely, or those that the student names.

N positions with loss   K ids kept per position   S temperatures
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa

from shared.targets.asks.ask import MASSES, Arrays, Ask, IdsEncoding, listed
from shared.targets.codec.columns import Column, Columns
from shared.targets.codec.decoding import logprobs_from_int8
from shared.targets.codec.elias_fano import EliasFano

if TYPE_CHECKING:
    from shared.config.targets import Targets

Encoding = Literal["fp16", "int8", "fp32"]

LOGPROB_TYPES = {"fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.uint8()}
IDS, LOG_PROBABILITIES = "ids", "log-probabilities"
BULKY_IDS = 4096  # answers this wide travel one row at a time


@dataclass(frozen=True, slots=True)
class KeptIds(Ask):
    """Some ids of each position, in ascending order, and the exact mass of all others."""

    num_ids: int  # K
    shared_vocab: int
    encoding: Encoding = field(default="fp16", kw_only=True)  # of the kept log-probabilities
    # How the ids are written: it loses nothing and is no part of the question.
    ids: IdsEncoding = field(default="elias_fano", compare=False, kw_only=True)

    holds: ClassVar = (IDS, LOG_PROBABILITIES, MASSES)

    @classmethod
    @abstractmethod
    def asked(
        cls, targets: "Targets", *, shared_vocab: int, temperatures: tuple[float, ...]
    ) -> Self:
        """What a config's `targets` asks in training; `temperatures` are 1 and then those of the
        losses."""

    @property
    def names_ids(self) -> bool:
        """Whether answers hold a column of ids."""
        return True

    @property
    def code(self) -> EliasFano:
        """How ids are written in the fewest bytes."""
        return EliasFano(self.num_ids, self.shared_vocab)

    @property
    def is_bulky(self) -> bool:
        """See `Ask`."""
        return self.num_ids >= BULKY_IDS

    @property
    def is_rounded(self) -> bool:
        """See `Ask`."""
        return self.encoding == "int8"

    def rewritten(self, columns: Columns, ids: IdsEncoding) -> tuple["KeptIds", Arrays]:
        """See `Ask`."""
        other = replace(self, ids=ids)
        if not self.names_ids or ids == self.ids:
            return other, {}
        ids_NK = self._ids(columns)
        if ids == "plain":
            return other, {"top_ids": ids_NK.astype(other._id_type.to_pandas_dtype())}
        return other, {"top_ids": other.code.encode(ids_NK)}

    def mass_in_words(self, mass: float) -> str:
        """See `Ask`."""
        return f"{self.selector} {self.num_ids} holds {mass:.1%} of the mass"

    def _ids_columns(self) -> dict[str, Column]:
        if not self.names_ids:
            return {}
        if self.ids == "plain":
            return {"top_ids": Column(pa.list_(self._id_type, self.num_ids), IDS)}
        return {"top_ids": Column(pa.list_(pa.uint8(), self.code.num_bytes), IDS)}

    @property
    def _id_type(self) -> pa.DataType:
        """The least whole number that holds any shared id."""
        return pa.uint16() if self.shared_vocab <= 2**16 else pa.int32()

    def _ids(self, columns: Columns) -> np.ndarray:
        written = columns.matrix("top_ids")
        return written.astype(np.int64) if self.ids == "plain" else self.code.decode(written)

    def _logprob_column(self, size: int | None, **more: Any) -> Column:
        """Log-probabilities, `size` of them an entry."""
        one = LOGPROB_TYPES[self.encoding]
        return Column(one if size is None else pa.list_(one, size), LOG_PROBABILITIES, **more)

    def _range_column(self, name: str) -> dict[str, Column]:
        """Nats that the steps of int8 cover."""
        return {name: Column(pa.float16(), LOG_PROBABILITIES)} if self.encoding == "int8" else {}

    def _stored(self) -> dict[str, Any]:
        return {
            "selector": self.selector,
            "top_k": self.num_ids,
            "shared_vocab": self.shared_vocab,
            "encoding": self.encoding,
            "ids": self.ids,
        }

    @staticmethod
    def _from_stored(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor."""
        named = {name: fields[name] for name in ("shared_vocab", "encoding", "ids")}
        return {"num_ids": fields["top_k"], **named}


@dataclass(frozen=True, slots=True)
class LikeliestIds(KeptIds):
    """The most likely ids with their log-probabilities, or some that the student names and the most
    likely beside them, and the mass of all others at each temperature. Every shared id, if as many
    are kept."""

    temperatures: tuple[float, ...] = field(default=(1.0,), kw_only=True)  # of the masses
    entropy: bool = field(default=False, kw_only=True)  # at temperature 1, per position
    # Of the ids kept, those that the student names with the rows (`Rows.with_student_ids`).
    student_ids: int = field(default=0, kw_only=True)

    selector: ClassVar = "top_k"

    @classmethod
    def asked(
        cls, targets: "Targets", *, shared_vocab: int, temperatures: tuple[float, ...]
    ) -> "LikeliestIds":
        """See `KeptIds`."""
        return cls(
            targets.top_k + targets.student_ids,
            shared_vocab,
            encoding=targets.encoding,
            ids=targets.ids,
            temperatures=temperatures,
            student_ids=targets.student_ids,
        )

    @property
    def names_ids(self) -> bool:
        """Whether answers hold a column of ids: not where every shared one is kept."""
        return self.num_ids != self.shared_vocab

    @property
    def with_entropy(self) -> bool:
        """See `Ask`."""
        return self.entropy

    def without_student(self) -> "LikeliestIds":
        """See `Ask`; as many of the likeliest stand for the ids named."""
        return replace(self, student_ids=0)

    def columns(self) -> dict[str, Column]:
        """See `Ask`."""
        return {
            **self._ids_columns(),
            **self._range_column("top_logprobs_range"),
            "top_logprobs": self._logprob_column(self.num_ids),
            "log_tail": Column(pa.list_(pa.float32(), len(self.temperatures)), MASSES),
        }

    def decode(self, columns: Columns) -> Arrays:
        """`ids_NK`, int64, ascending; `logprobs_NK`, float32; `log_tail_NS`, float32, exact
        log-mass outside the kept ids at each temperature."""
        tail_NS = columns.matrix("log_tail")
        logprobs_NK = columns.matrix("top_logprobs")
        if self.encoding == "int8":
            range_N = columns.vector("top_logprobs_range")
            tail_N = tail_NS[:, self.temperatures.index(1.0)]
            logprobs_NK = logprobs_from_int8(logprobs_NK, range_N, tail_N)
        return {
            "ids_NK": self._ids(columns),
            "logprobs_NK": logprobs_NK.astype(np.float32, copy=False),
            "log_tail_NS": tail_NS,
        }

    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        """The mass of the kept ids at temperature 1 [N]."""
        return -np.expm1(arrays["log_tail_NS"][:, self.temperatures.index(1.0)])

    def in_words(self) -> str:
        """See `Ask`."""
        own = f", and {self.student_ids} named by the student" if self.student_ids else ""
        return (
            f"top_k {self.num_ids - self.student_ids} of {self.shared_vocab:,} ids at temperature "
            f"{listed(self.temperatures)} in {self.encoding}{own}"
            f"{', entropy' if self.entropy else ''}"
        )

    def stored(self) -> dict[str, Any]:
        """See `Ask`."""
        return {
            **self._stored(),
            "temperatures": self.temperatures,
            "entropy": self.entropy,
            "student_ids": self.student_ids,
        }

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "LikeliestIds":
        """See `Ask`."""
        return cls(
            **cls._from_stored(fields),
            temperatures=tuple(fields["temperatures"]),
            entropy=fields["entropy"],
            student_ids=fields["student_ids"],
        )

    def _ids(self, columns: Columns) -> np.ndarray:
        if self.names_ids:
            return KeptIds._ids(self, columns)
        every_K = np.arange(self.num_ids)
        return np.broadcast_to(every_K, (columns.num_positions, self.num_ids))

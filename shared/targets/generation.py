"""What a teacher is asked to write, and what it wrote: token ids in, token ids out.

Both are Arrow tables, a row each; the answer describes itself in its metadata, as SoftTargets do.

T tokens of an opening   U tokens of its continuation
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shared.errors import TeacherError

SCHEMA_VERSION = 1
METADATA_KEY = b"tutelage.continuations"

TokenIds = Sequence[int] | np.ndarray

OPENINGS = pa.schema({"name": pa.string(), "input_ids": pa.list_(pa.int32())})


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """How to go on; with the opening and the teacher it determines the continuation."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()  # any of them ends a continuation and is left out of it
    temperature: float = 0.0  # 0: the most likely token, always
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping) -> "GenerationSpec":
        """The inverse of `as_dict` after a trip through JSON."""
        return GenerationSpec(**{**fields, "stop_ids": tuple(fields["stop_ids"])})

    def in_words(self) -> str:
        """The question as a message names it."""
        return (
            f"at most {self.max_new_tokens} tokens at temperature {self.temperature:g}, "
            f"seed {self.seed}, up to any of ids {list(self.stop_ids)}"
        )


@dataclass(frozen=True, slots=True)
class Openings:
    """Token ids to be continued; what a generation request carries."""

    table: pa.Table

    @staticmethod
    def build(*, names: Sequence[str], input_ids: Sequence[TokenIds]) -> "Openings":
        """One entry of each argument per opening; names are for messages."""
        columns = [pa.array(list(names), pa.string()), _lists(input_ids)]
        return Openings(pa.Table.from_arrays(columns, schema=OPENINGS))

    def __len__(self) -> int:
        return self.table.num_rows

    def names(self) -> list[str]:
        """The name of each opening, for messages."""
        return self.table.column("name").to_pylist()

    def ids(self) -> list[np.ndarray]:
        """Token ids of each opening, int32 [T]."""
        return _arrays(self.table.column("input_ids"))

    def hashes(self) -> list[bytes]:
        """16 bytes per opening over its token ids."""
        return [xxhash.xxh3_128_digest(ids.tobytes()) for ids in self.ids()]


@dataclass(frozen=True, slots=True)
class Continuations:
    """The teacher's answer to one batch of openings."""

    table: pa.Table

    @staticmethod
    def build(
        openings: Openings,
        spec: GenerationSpec,
        *,
        teacher: Mapping[str, str],
        output_ids: Sequence[TokenIds],
        stopped: Sequence[bool],
    ) -> "Continuations":
        """Continuations in the order of their openings; `stopped` where a stop id ended one."""
        columns = {
            "opening_hash": pa.array(openings.hashes(), pa.binary(16)),
            "output_ids": _lists(output_ids),
            "stopped": pa.array(list(stopped), pa.bool_()),
        }
        described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": spec.as_dict(),
        }
        metadata = {METADATA_KEY: json.dumps(described)}
        return Continuations(pa.table(columns).replace_schema_metadata(metadata))

    @property
    def described(self) -> dict:
        """Schema version, teacher fingerprint and spec, from the Table's own metadata."""
        return json.loads((self.table.schema.metadata or {})[METADATA_KEY])

    @property
    def num_bytes(self) -> int:
        """Bytes of the serialised Table."""
        return self.table.nbytes

    def ids(self) -> list[np.ndarray]:
        """Token ids of each continuation, int32 [U], without what stopped it."""
        return _arrays(self.table.column("output_ids"))

    def stopped(self) -> list[bool]:
        """Whether each came to a stop id before its tokens were used up."""
        return self.table.column("stopped").to_pylist()

    def check(
        self, openings: Openings, spec: GenerationSpec, teacher: Mapping[str, str] | None = None
    ) -> None:
        """Refuse an answer to other openings, another question or from another teacher.

        Raises TeacherError; the pool retries the unit elsewhere.
        """
        described = self.described
        if described["schema_version"] != SCHEMA_VERSION:
            raise TeacherError(
                f"the answer has schema version {described['schema_version']}, this is "
                f"{SCHEMA_VERSION}; restart the teacher service with this version"
            )
        if self.table.column("opening_hash").to_pylist() != openings.hashes():
            raise TeacherError(f"the answer does not continue {', '.join(openings.names())}")
        answered = GenerationSpec.from_dict(described["spec"])
        if answered != spec:
            raise TeacherError(
                f"the answer is to {answered.in_words()}, asked was {spec.in_words()}"
            )
        if teacher is not None and described["teacher"] != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")


def _lists(ids: Sequence[TokenIds]) -> pa.ListArray:
    return pa.array([np.asarray(each, np.int32) for each in ids], pa.list_(pa.int32()))


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [np.asarray(scalar.values.to_numpy(), np.int32) for scalar in column]

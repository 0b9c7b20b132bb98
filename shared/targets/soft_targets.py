"""SoftTargets: what a teacher says about a scoring unit. The one value that crosses the wire.

A row of the Table is a row of the unit; its lists hold one entry per position with loss, in the
order of `shared.data.layout`. The Table describes itself in its metadata, so nothing about it is
ever repeated in a config. The same Table travels, lies in the object store and on disk, where its
ids may be written in another way. What its columns are, the question's ask says.

N positions with loss, all rows end to end   D width of the hidden states shipped   R rows
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from shared.data.rows import Rows
from shared.errors import TeacherError
from shared.targets.asks.ask import Arrays, IdsEncoding
from shared.targets.codec.columns import Column, Columns, entries_of, list_arrays
from shared.targets.question import Question

SCHEMA_VERSION = 3
METADATA_KEY = b"tutelage.soft_targets"


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """What a SoftTargets says, flat; read-only where it is a view of shared memory."""

    kept: Arrays  # as the question's ask decodes it
    label_logprob_N: np.ndarray  # float32
    hidden_ND: dict[int, np.ndarray]  # float32, or uint16 holding bfloat16 bits (bf16)
    # float32, nats at temperature 1, drawn: at that of the draw; None: not asked for
    entropy_N: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """The teacher's answer to one scoring unit."""

    table: pa.Table

    @staticmethod
    def build(
        *,
        question: Question,
        teacher: Mapping[str, str],
        row_hashes: list[bytes],
        num_targets_R: np.ndarray,
        columns: Mapping[str, np.ndarray],
    ) -> "SoftTargets":
        """Of the columns that the question describes, all positions end to end; `teacher` is the
        engine's fingerprint."""
        described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": question.as_dict(),
        }
        lists = list_arrays(columns, question.columns(0), num_targets_R)
        table = pa.table({"row_hash": pa.array(row_hashes, pa.binary(16)), **lists})
        return SoftTargets(table.replace_schema_metadata({METADATA_KEY: json.dumps(described)}))

    @property
    def described(self) -> dict:
        """Schema version, teacher fingerprint and question, from the Table's own metadata."""
        return json.loads((self.table.schema.metadata or {})[METADATA_KEY])

    @property
    def question(self) -> Question:
        """What was asked."""
        return Question.from_dict(self.described["spec"])

    @property
    def ids(self) -> IdsEncoding:
        """How its ids are written."""
        return self.described["spec"]["ids"]

    @property
    def num_bytes(self) -> int:
        """Bytes of the serialised Table."""
        return self.table.nbytes

    def check(
        self, rows: Rows, question: Question, teacher: Mapping[str, str] | None = None
    ) -> None:
        """Refuse an answer to other rows, another question or from another teacher.

        Raises TeacherError; the pool retries the unit elsewhere.
        """
        described = self.described
        if described["schema_version"] != SCHEMA_VERSION:
            raise TeacherError(
                f"the answer has schema version {described['schema_version']}, this is "
                f"{SCHEMA_VERSION}; restart the teacher service with the trainer's version"
            )
        if self.table.column("row_hash").to_pylist() != rows.hashes():
            raise TeacherError(f"the answer is not about rows {rows.named()}")
        if self.question != question:
            raise TeacherError(
                f"the answer is to {self.question.in_words()}, asked was {question.in_words()}"
            )
        self._columns.refuse_other_types(self._expected)
        self._columns.refuse_other_lengths(self._expected, rows)
        if teacher is not None and described["teacher"] != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")

    def arrays(self) -> TargetArrays:
        """Decode to flat arrays. Raises TeacherError for a damaged Table."""
        question, columns = self.question, self._columns
        columns.refuse_other_types(self._expected)
        return TargetArrays(
            kept=question.ask.decode(columns),
            label_logprob_N=columns.vector("label_logprob"),
            hidden_ND=question.hidden.decode(columns),
            entropy_N=columns.vector("entropy") if question.ask.with_entropy else None,
        )

    def with_ids(self, ids: IdsEncoding) -> "SoftTargets":
        """The same answer with its ids written in another way; nothing is lost."""
        question, table = self.question, self.table
        ask, changed = question.ask.rewritten(self._columns, ids)
        for name, column in changed.items():
            place = table.schema.get_field_index(name)
            offsets = table.column(name).combine_chunks().offsets.to_numpy()
            lists = pa.ListArray.from_arrays(offsets - offsets[0], entries_of(column))
            table = table.set_column(place, name, lists)
        other = replace(question, ask=ask)
        described = json.dumps(self.described | {"spec": other.as_dict()})
        return SoftTargets(table.replace_schema_metadata({METADATA_KEY: described}))

    @property
    def _columns(self) -> Columns:
        return Columns(self.table)

    @property
    def _expected(self) -> dict[str, Column]:
        question = self.question
        return question.columns(question.hidden.width(self.table.schema))

"""SoftTargets: what a teacher says about a scoring unit. The one value that crosses the wire.

A row of the Table is a row of the unit; its lists hold one entry per position with loss, in the
order of `shared.data.layout`. The Table describes itself in its metadata, so nothing about it is
ever repeated in a config. The same Table travels, lies in the object store and on disk, where its
ids may be written in another way. It holds ids with log-probabilities, or the teacher's last hidden
state, from which its head makes all of them.

N positions with loss, all rows end to end   K ids kept per position   S temperatures
D hidden width
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from shared.data.rows import Rows
from shared.errors import TeacherError
from shared.targets.decoding import (
    EXACT,
    LOGPROBS,
    RANGE,
    equal_log_weights,
    log_weights,
    logprobs_from_int8,
    num_exact,
)
from shared.targets.elias_fano import EliasFano
from shared.targets.spec import IdsEncoding, TargetSpec

SCHEMA_VERSION = 3
METADATA_KEY = b"tutelage.soft_targets"
# bfloat16 travels as its bits.
STATE_TYPES = {"bf16": pa.uint16(), "fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.int8()}
LOGPROB_TYPES = {"fp16": pa.float16(), "fp32": pa.float32(), "int8": pa.uint8()}


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """What a SoftTargets says, flat; read-only where it is a view of shared memory."""

    ids_NK: np.ndarray  # int64, ascending
    # float32; of a selector that draws, the logs of the ids' weights, at the draw's temperature
    logprobs_NK: np.ndarray
    log_tail_NS: np.ndarray  # float32, exact log-mass outside the kept ids at each temperature
    label_logprob_N: np.ndarray  # float32
    hidden_ND: dict[int, np.ndarray]  # float32, or uint16 holding bfloat16 bits (bf16)
    # float32, nats at temperature 1, drawn: at that of the draw; None: not asked for
    entropy_N: np.ndarray | None = None
    # The head's input in the teacher's own type, bfloat16 as uint16 bits; None: not asked for, else
    # no ids are kept.
    last_ND: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """The teacher's answer to one scoring unit."""

    table: pa.Table

    @staticmethod
    def build(
        *,
        spec: TargetSpec,
        teacher: Mapping[str, str],
        row_hashes: list[bytes],
        num_targets_R: np.ndarray,
        columns: Mapping[str, np.ndarray],
    ) -> "SoftTargets":
        """Of the columns that `column_types` describes, all positions end to end; `teacher` is the
        engine's fingerprint."""
        offsets = _offsets(num_targets_R)
        lists: dict[str, pa.Array] = {"row_hash": pa.array(row_hashes, pa.binary(16))}
        for name, column in columns.items():
            ends = offsets
            if name == LOGPROBS:
                ends = _offsets(num_exact(columns[EXACT]))[offsets]
            lists[name] = pa.ListArray.from_arrays(ends, _flat_column(column))
        described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": spec.as_dict(),
        }
        table = pa.table(lists)
        return SoftTargets(table.replace_schema_metadata({METADATA_KEY: json.dumps(described)}))

    @property
    def described(self) -> dict:
        """Schema version, teacher fingerprint and spec, from the Table's own metadata."""
        return json.loads((self.table.schema.metadata or {})[METADATA_KEY])

    @property
    def spec(self) -> TargetSpec:
        """What was asked for."""
        return TargetSpec.from_dict(self.described["spec"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the serialised Table."""
        return self.table.nbytes

    def check(self, rows: Rows, spec: TargetSpec, teacher: Mapping[str, str] | None = None) -> None:
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
        if self.spec != spec:
            raise TeacherError(
                f"the answer is to {self.spec.in_words()}, asked was {spec.in_words()}"
            )
        self._refuse_misshapen(rows)
        if teacher is not None and described["teacher"] != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")

    def arrays(self) -> TargetArrays:
        """Decode to flat arrays. Raises TeacherError for a damaged Table."""
        self._refuse_misshapen()
        spec = self.spec
        hidden = {layer: self._hidden(layer, spec) for layer in spec.hidden_layers}
        label_logprob_N = self._vector("label_logprob")
        empty_N0 = np.empty((len(label_logprob_N), 0), np.float32)
        return TargetArrays(
            ids_NK=empty_N0.astype(np.int64) if spec.head else self._ids(spec),
            logprobs_NK=empty_N0 if spec.head else self._logprobs(spec),
            log_tail_NS=empty_N0 if spec.head else self._matrix("log_tail"),
            label_logprob_N=label_logprob_N,
            hidden_ND=hidden,
            entropy_N=self._vector("entropy") if spec.entropy else None,
            last_ND=self._matrix("last_hidden") if spec.head else None,
        )

    def with_ids(self, ids: IdsEncoding) -> "SoftTargets":
        """The same answer with its ids written in another way; nothing is lost."""
        spec = self.spec
        other = replace(spec, ids=ids)
        if ids == spec.ids:
            return self
        table = self.table
        if spec.names_ids:
            place = table.schema.get_field_index("top_ids")
            offsets = table.column("top_ids").combine_chunks().offsets.to_numpy()
            written = _flat_column(_written(self._ids(spec), other))
            lists = pa.ListArray.from_arrays(offsets - offsets[0], written)
            table = table.set_column(place, "top_ids", lists)
        described = json.dumps(self.described | {"spec": other.as_dict()})
        return SoftTargets(table.replace_schema_metadata({METADATA_KEY: described}))

    def _ids(self, spec: TargetSpec) -> np.ndarray:
        if spec.is_full:
            num = len(self._vector("label_logprob"))
            return np.broadcast_to(np.arange(spec.top_k), (num, spec.top_k))
        written = self._matrix("top_ids")
        if spec.ids == "plain":
            return written.astype(np.int64)
        return EliasFano(spec.top_k, spec.shared_vocab).decode(written)

    def _logprobs(self, spec: TargetSpec) -> np.ndarray:
        if spec.selector == "sampled":
            return equal_log_weights(len(self._vector("label_logprob")), spec.top_k)
        if spec.selector == "threshold":
            range_N = self._vector(RANGE) if spec.encoding == "int8" else None
            tail_N = self._matrix("log_tail")[:, 0]
            written_H = self._vector(LOGPROBS)
            return log_weights(self._matrix(EXACT), written_H, range_N, tail_N, spec.top_k)
        written = self._matrix("top_logprobs")
        if spec.encoding != "int8":
            return written.astype(np.float32, copy=False)
        tail_N = self._matrix("log_tail")[:, spec.temperatures.index(1.0)]
        return logprobs_from_int8(written, self._vector("top_logprobs_range"), tail_N)

    def _hidden(self, layer: int, spec: TargetSpec) -> np.ndarray:
        states_ND = self._matrix(hidden_column(layer))
        if spec.hidden_encoding != "int8":
            return states_ND
        return states_ND.astype(np.float32) * self._vector(scale_column(layer))[:, None]

    def _matrix(self, name: str) -> np.ndarray:
        lists = _flat(self.table.column(name))
        return lists.flatten().to_numpy(zero_copy_only=True).reshape(-1, lists.type.list_size)

    def _vector(self, name: str) -> np.ndarray:
        return _flat(self.table.column(name)).to_numpy()

    def _refuse_misshapen(self, rows: Rows | None = None) -> None:
        """Columns of other types than the spec's or, with `rows`, of other lengths than theirs."""
        spec, schema = self.spec, self.table.schema
        for name, type_ in column_types(spec, _hidden_width(schema, spec)).items():
            place = schema.get_field_index(name)
            if place < 0 or schema.field(place).type != pa.list_(type_):
                found = "is missing" if place < 0 else f"holds {schema.field(place).type}"
                raise TeacherError(
                    f"column {name} of an answer {found}, it must hold {pa.list_(type_)}; "
                    "the answer is damaged or of another version"
                )
        if rows is None:
            return
        num_R = rows.num_loss_tokens()
        lengths = dict.fromkeys(schema.names[1:], num_R)
        if LOGPROBS in lengths:
            exact = np.concatenate([[0], num_exact(self._matrix(EXACT)).cumsum()])
            lengths[LOGPROBS] = np.diff(exact[np.minimum(_offsets(num_R), len(exact) - 1)])
        for name, length_R in lengths.items():
            offsets = self.table.column(name).combine_chunks().offsets.to_numpy()
            if not np.array_equal(np.diff(offsets), length_R):
                raise TeacherError(
                    f"column {name} of an answer does not have an entry for every token with loss "
                    f"of rows {', '.join(rows.names())}; the answer is damaged"
                )


def hidden_column(layer: int) -> str:
    """Name of the column of a teacher layer's hidden states."""
    return f"hidden_{layer}"


def scale_column(layer: int) -> str:
    """Name of the column with the int8 states' step of each position."""
    return f"hidden_{layer}_scale"


def column_types(spec: TargetSpec, hidden_width: int) -> dict[str, pa.DataType]:
    """What every column has of a position, of which ids kept exactly have several or no entries;
    hidden states are as wide as the teacher's or their projection."""
    if spec.head:
        assert spec.states, "a spec names the type of what it asks for"
        types = {"last_hidden": pa.list_(STATE_TYPES[spec.states], spec.states_width)}
    else:
        types = {"top_ids": _ids_type(spec)} if spec.names_ids else {}
        types["log_tail"] = pa.list_(pa.float32(), len(spec.temperatures))
        types |= _logprob_types(spec)
    types["label_logprob"] = pa.float32()
    types |= {"entropy": pa.float32()} if spec.entropy else {}
    for layer in spec.hidden_layers:
        if spec.hidden_encoding == "int8":
            types[scale_column(layer)] = pa.float32()
        types[hidden_column(layer)] = pa.list_(STATE_TYPES[spec.hidden_encoding], hidden_width)
    return types


def _hidden_width(schema: pa.Schema, spec: TargetSpec) -> int:
    """Of the first layer's column; 0 where there is none of the kind."""
    first = hidden_column(spec.hidden_layers[0]) if spec.hidden_layers else ""
    place = schema.get_field_index(first)
    entry = getattr(schema.field(place).type, "value_type", None) if place >= 0 else None
    return getattr(entry, "list_size", 0)


def _ids_type(spec: TargetSpec) -> pa.DataType:
    if spec.ids == "plain":
        least = pa.uint16() if spec.shared_vocab <= 2**16 else pa.int32()
        return pa.list_(least, spec.top_k)
    return pa.list_(pa.uint8(), EliasFano(spec.top_k, spec.shared_vocab).num_bytes)


def _logprob_types(spec: TargetSpec) -> dict[str, pa.DataType]:
    one = LOGPROB_TYPES[spec.encoding]
    if spec.selector == "sampled":
        return {}
    if spec.selector == "threshold":
        types, range_ = {EXACT: pa.list_(pa.uint8(), -(-spec.top_k // 8)), LOGPROBS: one}, RANGE
    else:
        types, range_ = {"top_logprobs": pa.list_(one, spec.top_k)}, "top_logprobs_range"
    return types | ({range_: pa.float16()} if spec.encoding == "int8" else {})


def _written(ids_NK: np.ndarray, spec: TargetSpec) -> np.ndarray:
    """Ascending ids as `spec.ids` says: the bytes of `EliasFano`, or the least whole integers."""
    if spec.ids == "plain":
        return ids_NK.astype(_ids_type(spec).value_type.to_pandas_dtype())
    return EliasFano(spec.top_k, spec.shared_vocab).encode(ids_NK)


def _flat_column(column: np.ndarray) -> pa.Array:
    """Numbers, or lists of a fixed size [N, K]."""
    if column.ndim == 1:
        return pa.array(column)
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()

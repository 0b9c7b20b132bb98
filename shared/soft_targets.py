"""SoftTargets: what a teacher says about a scoring unit. The one value that crosses the wire.

A row of the Table is a row of the unit; its lists hold one entry per position with loss, in the
order of `shared.layout`. The Table describes itself in its metadata, so nothing about it is ever
repeated in a config. The same Table travels, lies in the object store and on disk, where its ids
may be written in another way. It holds ids with log-probabilities, or the teacher's last hidden
state, from which its head makes all of them.

N positions with loss, all rows end to end   K ids kept per position   S temperatures
D hidden width
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from shared.drawn_targets import (
    EXACT,
    LOGPROBS,
    RANGE,
    drawn_in_order,
    equal_log_weights,
    exact_columns,
    log_weights,
    num_exact,
)
from shared.elias_fano import EliasFano
from shared.encoding import (
    in_float16,
    logprobs_from_int8,
    logprobs_in_int8,
    placed_by_id,
    refuse_non_finite,
    sorted_by_id,
)
from shared.errors import TeacherError
from shared.rows import Rows
from shared.target_spec import IdsEncoding, TargetSpec

SCHEMA_VERSION = 3
METADATA_KEY = b"tutelage.soft_targets"
STATE_TYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """Flat views of a SoftTargets; read-only where they are views of shared memory.

    Of a selector that draws, `logprobs_NK` into a table are those of the ids kept exactly, -inf for
    the others; out of it they are the logs of all ids' weights, at the temperature of the draw.
    """

    ids_NK: np.ndarray  # int64 and ascending out of a table, any integers in any order into it
    logprobs_NK: np.ndarray  # float32; into a table float16 too, if that is how they are written
    log_tail_NS: np.ndarray  # float32, exact log-mass outside the kept ids at each temperature
    label_logprob_N: np.ndarray  # float32
    # float32, or uint16 holding bfloat16 bits (bf16); int8 into a table, with the step of each
    # position, float32
    hidden_ND: dict[int, np.ndarray]
    hidden_scale_N: dict[int, np.ndarray] = field(default_factory=dict, kw_only=True)
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
        arrays: TargetArrays,
    ) -> "SoftTargets":
        """Encode flat arrays, rounding whatever is not in the spec's types yet.

        `teacher` is the engine's fingerprint. Raises TeacherError on a non-finite value.
        """
        logprobs_NK = arrays.logprobs_NK
        if spec.is_drawn:
            logprobs_NK = logprobs_NK[logprobs_NK != -np.inf]
        named = {"logprobs": logprobs_NK, "label_logprob": arrays.label_logprob_N}
        named |= {"entropy": arrays.entropy_N, "last_hidden": arrays.last_ND}
        refuse_non_finite(named, log_tail_NS=arrays.log_tail_NS)
        flat = _columns(spec, arrays)
        offsets = _offsets(num_targets_R)
        columns: dict[str, pa.Array] = {"row_hash": pa.array(row_hashes, pa.binary(16))}
        for name, column in flat.items():
            ends = offsets
            if name == LOGPROBS:
                ends = _offsets((arrays.logprobs_NK > -np.inf).sum(axis=1))[offsets]
            columns[name] = pa.ListArray.from_arrays(ends, column)
        described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": spec.as_dict(),
        }
        table = pa.table(columns)
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
            lists = pa.ListArray.from_arrays(offsets - offsets[0], _written(self._ids(spec), other))
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
        for name, column in _columns(spec, _no_arrays(spec)).items():
            place = schema.get_field_index(name)
            if place < 0 or schema.field(place).type != pa.list_(column.type):
                found = "is missing" if place < 0 else f"holds {schema.field(place).type}"
                raise TeacherError(
                    f"column {name} of an answer {found}, it must hold {pa.list_(column.type)}; "
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


def _columns(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    """Every column but the rows' hashes, all positions end to end."""
    columns = _state_column(spec, arrays) if spec.head else _kept_columns(spec, arrays)
    columns["label_logprob"] = pa.array(arrays.label_logprob_N.astype(np.float32))
    if spec.entropy:
        assert arrays.entropy_N is not None, "the engine computes what the spec asks for"
        columns["entropy"] = pa.array(arrays.entropy_N.astype(np.float32))
    for layer, states_ND in arrays.hidden_ND.items():
        if spec.hidden_encoding == "int8":
            columns[scale_column(layer)] = pa.array(arrays.hidden_scale_N[layer])
        columns[hidden_column(layer)] = _lists(states_ND)
    return columns


def _kept_columns(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    if spec.is_drawn:
        return _drawn_columns(spec, arrays)
    if spec.is_full:
        logprobs_NK = placed_by_id(arrays.ids_NK, arrays.logprobs_NK)
    else:
        ids_NK, logprobs_NK = sorted_by_id(arrays.ids_NK, arrays.logprobs_NK, spec.shared_vocab)
        columns["top_ids"] = _written(ids_NK, spec)
    if spec.encoding == "int8":
        tail_N = arrays.log_tail_NS[:, spec.temperatures.index(1.0)]
        logprobs_NK, range_N = logprobs_in_int8(logprobs_NK, tail_N)
        columns["top_logprobs_range"] = pa.array(range_N)
    elif spec.encoding == "fp16":
        logprobs_NK = in_float16(logprobs_NK)
    log_tail_NS = arrays.log_tail_NS.astype(np.float32)
    return columns | {"top_logprobs": _lists(logprobs_NK), "log_tail": _lists(log_tail_NS)}


def _state_column(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    assert arrays.last_ND is not None, "the engine ships what the spec asks for"
    assert spec.states
    return {"last_hidden": _lists(arrays.last_ND.astype(STATE_TYPES[spec.states], copy=False))}


def _drawn_columns(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    ids_NK, logprobs_NK, tail_N = arrays.ids_NK, arrays.logprobs_NK, arrays.log_tail_NS[:, 0]
    ids_NK, logprobs_NK = drawn_in_order(ids_NK, logprobs_NK, tail_N, spec.shared_vocab)
    columns = {"top_ids": _written(ids_NK, spec), "log_tail": _lists(arrays.log_tail_NS)}
    if spec.selector == "sampled":
        return columns
    found = exact_columns(logprobs_NK, spec.encoding)
    return columns | {name: _lists(a) if a.ndim > 1 else pa.array(a) for name, a in found.items()}


def _written(ids_NK: np.ndarray, spec: TargetSpec) -> pa.FixedSizeListArray:
    """Ascending ids as `spec.ids` says: the bytes of `EliasFano`, or the least whole integers."""
    if spec.ids == "plain":
        return _lists(ids_NK.astype(np.uint16 if spec.shared_vocab <= 2**16 else np.int32))
    return _lists(EliasFano(spec.top_k, spec.shared_vocab).encode(ids_NK))


def _no_arrays(spec: TargetSpec) -> TargetArrays:
    """The answer about no position, without hidden states."""
    return TargetArrays(
        ids_NK=np.empty((0, spec.top_k), np.int64),
        logprobs_NK=np.empty((0, spec.top_k), np.float32),
        log_tail_NS=np.empty((0, len(spec.temperatures)), np.float32),
        label_logprob_N=np.empty(0, np.float32),
        hidden_ND={},
        entropy_N=np.empty(0, np.float32),
        last_ND=np.empty((0, spec.states_width), np.float32) if spec.head else None,
    )


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()

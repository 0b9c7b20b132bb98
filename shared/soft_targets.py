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
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from shared.elias_fano import EliasFano
from shared.encoding import (
    in_float16,
    logprobs_from_int8,
    logprobs_in_int8,
    placed_by_id,
    refuse_non_finite,
    sorted_by_id,
    states_in_int8,
)
from shared.errors import TeacherError
from shared.rows import Rows
from shared.teacher_head import StatesEncoding

SCHEMA_VERSION = 3
METADATA_KEY = b"tutelage.soft_targets"
STATE_TYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}

IdsEncoding = Literal["elias_fano", "plain"]

LATER = ("entropy", "prompts", "head", "states", "states_width")  # fields that few questions have


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What is asked of the teacher; with the row and the teacher it determines the answer."""

    top_k: int
    shared_vocab: int  # ids both tokenizers know; only these are selected, the rest is tail
    temperatures: tuple[float, ...] = (1.0,)
    encoding: Literal["fp16", "int8", "fp32"] = "fp16"  # of the kept log-probabilities
    hidden_layers: tuple[int, ...] = ()
    hidden_encoding: Literal["bf16", "int8", "fp32"] = "bf16"
    projection: str = ""  # digest of the matrices the hidden states pass through; "": none
    entropy: bool = False  # of the teacher's whole distribution, per position
    prompts: str = ""  # digest of the prompts the teacher is shown; "": none
    head: str = ""  # digest of the teacher's head, whose input travels whole in place of ids
    states: StatesEncoding | Literal[""] = ""  # type of that input, the teacher's own
    states_width: int = 0  # its numbers per position

    # How the ids are written: it loses nothing and is no part of the question.
    ids: IdsEncoding = field(default="elias_fano", compare=False)

    @property
    def is_full(self) -> bool:
        """Whether every shared id is kept, so that ids need not be named at all."""
        return self.top_k == self.shared_vocab

    @property
    def names_ids(self) -> bool:
        """Whether answers hold a column of ids."""
        return not self.is_full and not self.head

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes. Those of `LATER` are named only where they are asked for, so
        that answers without are called on disk what they were called before there were any."""
        fields = asdict(self)
        for name in LATER:
            if not fields[name]:
                del fields[name]
        return fields

    def question(self) -> dict[str, Any]:
        """The fields that decide what is answered."""
        return {name: value for name, value in self.as_dict().items() if name != "ids"}

    @staticmethod
    def from_dict(fields: Mapping) -> "TargetSpec":
        """The inverse of `as_dict`, also after a trip through JSON."""
        tuples = {name: tuple(fields[name]) for name in ("temperatures", "hidden_layers")}
        return TargetSpec(**{**fields, **tuples})

    def in_words(self) -> str:
        """The question as a message names it."""
        layers = ""
        if self.hidden_layers:
            layers = f", hidden layers {_listed(self.hidden_layers)} in {self.hidden_encoding}"
        kept = (
            f"top_k {self.top_k} of {self.shared_vocab:,} ids at temperature "
            f"{_listed(self.temperatures)} in {self.encoding}"
        )
        if self.head:
            kept = f"last hidden states in {self.states} before the head {self.head[:8]}"
        return (
            f"{kept}{layers}"
            f"{', entropy' if self.entropy else ''}"
            f"{f', shown prompts {self.prompts[:8]}' if self.prompts else ''}"
        )


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """Flat views of a SoftTargets; read-only where they are views of shared memory."""

    ids_NK: np.ndarray  # int64; ascending where they come out of a table, in any order into it
    logprobs_NK: np.ndarray  # float32
    log_tail_NS: np.ndarray  # float32, exact log-mass outside the kept ids at each temperature
    label_logprob_N: np.ndarray  # float32
    hidden_ND: dict[int, np.ndarray]  # float32, or uint16 holding bfloat16 bits (bf16)
    entropy_N: np.ndarray | None = None  # float32, nats at temperature 1; None: not asked for
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
        """Encode flat arrays; the one place the teacher's precision is lost.

        `teacher` is the engine's fingerprint. Raises TeacherError on a non-finite value.
        """
        named = {"logprobs": arrays.logprobs_NK, "label_logprob": arrays.label_logprob_N}
        named |= {"entropy": arrays.entropy_N, "last_hidden": arrays.last_ND}
        refuse_non_finite(named, log_tail_NS=arrays.log_tail_NS)
        offsets = np.concatenate([[0], np.cumsum(num_targets_R)]).astype(np.int32)
        flat = _columns(spec, arrays)
        columns: dict[str, pa.Array] = {"row_hash": pa.array(row_hashes, pa.binary(16))}
        columns |= {
            name: pa.ListArray.from_arrays(offsets, column) for name, column in flat.items()
        }
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
        for name in schema.names[1:]:
            offsets = self.table.column(name).combine_chunks().offsets.to_numpy()
            if not np.array_equal(np.diff(offsets), rows.num_loss_tokens()):
                raise TeacherError(
                    f"column {name} of an answer does not have an entry for every token with loss "
                    f"of rows {', '.join(rows.names())}; the answer is damaged"
                )


class TargetReader(Protocol):
    """Where SoftTargets come from: a pool of live teachers or a store on disk."""

    def submit(self, rows: Rows, spec: TargetSpec, /) -> None:
        """Ask for a unit; never blocks. Answers come back in the order of submission."""
        ...

    def next(self) -> SoftTargets:
        """The oldest answer not yet taken, waited for. Raises TeacherError, naming the rows."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...

    @property
    def stats(self) -> "ReaderStats":
        """Counters since the reader was made."""
        ...


@dataclass(slots=True)
class ReaderStats:
    """What a reader has done so far."""

    units: int = 0
    wait_s: float = 0.0  # time spent blocked in `next`
    wire_bytes: int = 0
    retried_units: int = 0
    cache_hits: int = 0


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


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
            states_ND, scale_N = states_in_int8(states_ND)
            columns[scale_column(layer)] = pa.array(scale_N)
        columns[hidden_column(layer)] = _lists(states_ND)
    return columns


def _kept_columns(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
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


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()

"""SoftTargets: what a teacher says about a scoring unit. The one value that crosses the wire.

A row of the Table is a row of the unit; its lists hold one entry per position with loss, in the
order of `shared.layout`. The Table describes itself in its metadata, so nothing about it is ever
repeated in a config. The same Table travels, lies in the object store and on disk.

N positions with loss, all rows end to end   K ids kept per position   S temperatures
D hidden width
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from shared.errors import TeacherError
from shared.rows import Rows

SCHEMA_VERSION = 2
METADATA_KEY = b"tutelage.soft_targets"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What is asked of the teacher; with the row and the teacher it determines the answer."""

    top_k: int
    shared_vocab: int  # ids both tokenizers know; only these are selected, the rest is tail
    temperatures: tuple[float, ...] = (1.0,)
    encoding: Literal["fp16", "fp32"] = "fp16"
    hidden_layers: tuple[int, ...] = ()
    hidden_encoding: Literal["bf16", "int8", "fp32"] = "bf16"
    projection: str = ""  # digest of the matrices the hidden states pass through; "": none
    entropy: bool = False  # of the teacher's whole distribution, per position
    prompts: str = ""  # digest of the prompts the teacher is shown; "": none

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes. Entropy and prompts are named only where they are asked for, so
        that answers without are called on disk what they were called before there were any."""
        fields = asdict(self)
        for name in ("entropy", "prompts"):
            if not fields[name]:
                del fields[name]
        return fields

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
        return (
            f"top_k {self.top_k} of {self.shared_vocab:,} ids at temperature "
            f"{_listed(self.temperatures)} in {self.encoding}{layers}"
            f"{', entropy' if self.entropy else ''}"
            f"{f', shown prompts {self.prompts[:8]}' if self.prompts else ''}"
        )


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """Flat views of a SoftTargets; read-only where they are views of shared memory."""

    ids_NK: np.ndarray  # int64, most likely first
    logprobs_NK: np.ndarray  # float32
    log_tail_NS: np.ndarray  # float32, exact log-mass outside the kept ids at each temperature
    label_logprob_N: np.ndarray  # float32
    hidden_ND: dict[int, np.ndarray]  # float32, or uint16 holding bfloat16 bits (bf16)
    entropy_N: np.ndarray | None = None  # float32, nats at temperature 1; None: not asked for


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
        _refuse_non_finite(arrays)
        offsets = np.concatenate([[0], np.cumsum(num_targets_R)]).astype(np.int32)
        flat = _encoded(spec, arrays)
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
        if teacher is not None and described["teacher"] != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")

    def arrays(self) -> TargetArrays:
        """Decode to flat arrays."""
        spec = self.spec
        logprobs = self._matrix("top_logprobs").astype(np.float32, copy=False)
        hidden = {layer: self._hidden(layer, spec) for layer in spec.hidden_layers}
        entropy_N = _flat(self.table.column("entropy")).to_numpy() if spec.entropy else None
        return TargetArrays(
            ids_NK=self._matrix("top_ids").astype(np.int64),
            logprobs_NK=logprobs,
            log_tail_NS=self._matrix("log_tail"),
            label_logprob_N=_flat(self.table.column("label_logprob")).to_numpy(),
            hidden_ND=hidden,
            entropy_N=entropy_N,
        )

    def _hidden(self, layer: int, spec: TargetSpec) -> np.ndarray:
        states_ND = self._matrix(hidden_column(layer))
        if spec.hidden_encoding != "int8":
            return states_ND
        scale_N = _flat(self.table.column(scale_column(layer))).to_numpy()
        return states_ND.astype(np.float32) * scale_N[:, None]

    def _matrix(self, name: str) -> np.ndarray:
        lists = _flat(self.table.column(name))
        return lists.flatten().to_numpy(zero_copy_only=True).reshape(-1, lists.type.list_size)


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


def _encoded(spec: TargetSpec, arrays: TargetArrays) -> dict[str, pa.Array]:
    id_type = np.uint16 if spec.shared_vocab <= 2**16 else np.int32
    float_type = np.float16 if spec.encoding == "fp16" else np.float32
    columns = {
        "top_ids": _lists(arrays.ids_NK.astype(id_type)),
        "top_logprobs": _lists(_rounded(arrays.logprobs_NK, float_type)),
        "log_tail": _lists(arrays.log_tail_NS.astype(np.float32)),
        "label_logprob": pa.array(arrays.label_logprob_N.astype(np.float32)),
    }
    if spec.entropy:
        assert arrays.entropy_N is not None, "the engine computes what the spec asks for"
        columns["entropy"] = pa.array(arrays.entropy_N.astype(np.float32))
    for layer, states_ND in arrays.hidden_ND.items():
        if spec.hidden_encoding == "int8":
            states_ND, scale_N = _in_int8(states_ND)
            columns[scale_column(layer)] = pa.array(scale_N)
        columns[hidden_column(layer)] = _lists(states_ND)
    return columns


def _in_int8(states_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to 127 steps either side of 0, and the size of a step per position [N]."""
    scale_N = (np.abs(states_ND).max(axis=1, initial=0) / 127).astype(np.float32)
    steps_N1 = np.where(scale_N > 0, scale_N, 1)[:, None]
    return np.rint(states_ND / steps_N1).astype(np.int8), scale_N


def _rounded(logprobs: np.ndarray, kind: type) -> np.ndarray:
    """In a narrower type, never below its smallest number: such a probability is 0 anyway."""
    return np.maximum(logprobs, np.finfo(kind).min).astype(kind)


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


def _refuse_non_finite(arrays: TargetArrays) -> None:
    """Kept and label log-probabilities and entropies are finite; a tail is -inf where nothing is
    left (k = V)."""
    for name in ("logprobs_NK", "label_logprob_N", "entropy_N"):
        values = getattr(arrays, name)
        if values is not None and not np.isfinite(values).all():
            raise TeacherError(f"the teacher computed a non-finite {name.rsplit('_', 1)[0]}")
    if np.isnan(arrays.log_tail_NS).any() or (arrays.log_tail_NS > 0).any():
        raise TeacherError("the teacher computed a tail mass outside [0, 1]")

"""What an answer costs per token, from the types of its columns."""

from dataclasses import dataclass, replace

import pyarrow as pa

from shared.config.base import Dtype
from shared.targets.decoding import LOGPROBS
from shared.targets.soft_targets import column_types
from shared.targets.spec import TargetSpec

BYTES = {"float32": 4, "bfloat16": 2}
EXACT_SHARE = 0.25  # about, of the ids of `threshold` that are kept with their log-probabilities


def bytes_per_token(spec: TargetSpec, *, hidden_width: int) -> dict[str, float]:
    """Bytes of a Table per position with loss, by what they hold, row overheads apart;
    `hidden_width` as shipped."""
    found: dict[str, float] = {}
    if not spec.head:
        found = {"ids": 0.0, "log-probabilities": 0.0, "masses and label": 0.0}
    for name, type_ in column_types(spec, hidden_width).items():
        entries = round(EXACT_SHARE * spec.top_k) if name == LOGPROBS else 1
        found[_kind(name)] = found.get(_kind(name), 0.0) + entries * _size(type_)
    return found


@dataclass(frozen=True, slots=True)
class Pair:
    """What decides the price of states: the teacher's width and head, and its type."""

    teacher_width: int
    teacher_rows: int
    dtype: Dtype

    @property
    def head_bytes(self) -> int:
        """Of the head's weight, which each worker reads once."""
        return self.teacher_rows * self.teacher_width * BYTES[self.dtype]


def payload_note(spec: TargetSpec, *, hidden_width: int, pair: Pair, top_k: int) -> str:
    """Sentences for the start of a run: what its answers cost, and what the other kind would.

    `top_k` is what ids would be asked for where states are. How many ids `threshold` keeps exactly
    depends on the text, so that its costs are about as said.
    """
    found = bytes_per_token(spec, hidden_width=hidden_width)
    parts = ", ".join(f"{kind} {round(size):,}" for kind, size in found.items())
    total, once = round(sum(found.values())), f"the head once {pair.head_bytes / 1e6:,.1f} MB"
    other = bytes_per_token(_other(spec, pair, top_k), hidden_width=hidden_width)
    instead = f"{round(sum(other.values())):,}"
    about = "about " if spec.selector == "threshold" else ""
    said = f"a token costs {about}{total:,} bytes from the teacher: {parts}"
    if spec.head:
        return f"{said}; and {once}; the {top_k} likeliest ids would cost {instead}"
    return f"{said}; with targets.exact=last_hidden {instead}, and {once}"


def _other(spec: TargetSpec, pair: Pair, top_k: int) -> TargetSpec:
    if spec.head:
        return replace(spec, top_k=top_k, head="", states="", states_width=0)
    states = "bf16" if pair.dtype == "bfloat16" else "fp32"
    return replace(
        spec,
        selector="top_k",
        entropy=False,
        top_k=0,
        head="other",
        states=states,
        states_width=pair.teacher_width,
    )


def _kind(column: str) -> str:
    if column == "last_hidden":
        return "last hidden state"
    if column.startswith("hidden_"):
        return "hidden states"
    if column.startswith(("top_logprobs", "exact")):
        return "log-probabilities"
    return "ids" if column == "top_ids" else "masses and label"


def _size(type_: pa.DataType) -> int:
    """Bytes of an entry, a number or a list of a fixed size."""
    if pa.types.is_fixed_size_list(type_):
        return type_.list_size * _size(type_.value_type)
    return type_.bit_width // 8

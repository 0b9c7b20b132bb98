"""What an answer costs per token: measured on a Table built as the teacher builds it.

N positions with loss   K ids kept per position   D hidden width
"""

from dataclasses import dataclass, replace

import numpy as np

from shared.config_base import Dtype
from shared.soft_targets import SoftTargets, TargetArrays
from shared.target_spec import TargetSpec

BYTES = {"float32": 4, "bfloat16": 2}
EXACT_SHARE = 0.25  # about, of the ids of `threshold` that are kept with their log-probabilities
NUM_POSITIONS = 256  # enough that what a row costs is little per position


def bytes_per_token(spec: TargetSpec, *, hidden_width: int) -> dict[str, float]:
    """Bytes of a Table per position with loss, by what they hold; `hidden_width` as shipped."""
    answer = SoftTargets.build(
        spec=spec,
        teacher={},
        row_hashes=[bytes(16)],
        num_targets_R=np.array([NUM_POSITIONS]),
        arrays=_arrays(spec, hidden_width),
    )
    found: dict[str, float] = {}
    if not spec.head:
        found = {"ids": 0.0, "log-probabilities": 0.0, "masses and label": 0.0}
    for name in answer.table.column_names:
        kind = _kind(name)
        found[kind] = found.get(kind, 0.0) + answer.table.column(name).nbytes / NUM_POSITIONS
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


def _arrays(spec: TargetSpec, hidden_width: int) -> TargetArrays:
    kept = max(1, spec.top_k)
    step = spec.shared_vocab // kept
    logprobs_NK = np.full((NUM_POSITIONS, spec.top_k), -np.log(2 * kept), np.float32)
    if spec.is_drawn:
        logprobs_NK[:, round(spec.top_k * EXACT_SHARE) :] = -np.inf
    shape = (NUM_POSITIONS, hidden_width)
    state_type = {"bf16": np.uint16, "int8": np.int8, "fp32": np.float32}[spec.hidden_encoding]
    flat_N = np.zeros(NUM_POSITIONS, np.float32)
    return TargetArrays(
        ids_NK=np.tile(np.arange(spec.top_k) * step, (NUM_POSITIONS, 1)),
        logprobs_NK=logprobs_NK,
        log_tail_NS=np.full((NUM_POSITIONS, len(spec.temperatures)), -np.log(2), np.float32),
        label_logprob_N=flat_N - 1,
        hidden_ND={layer: np.zeros(shape, state_type) for layer in spec.hidden_layers},
        hidden_scale_N=dict.fromkeys(spec.hidden_layers, flat_N),
        entropy_N=flat_N if spec.entropy else None,
        last_ND=np.zeros((NUM_POSITIONS, spec.states_width), np.float32) if spec.head else None,
    )

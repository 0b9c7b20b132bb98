"""What an answer costs per token: measured on a Table built as the teacher builds it.

N positions with loss   K ids kept per position   D hidden width
"""

import numpy as np

from shared.soft_targets import SoftTargets, TargetArrays, TargetSpec

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
    found = {"ids": 0.0, "log-probabilities": 0.0, "masses and label": 0.0}
    for name in answer.table.column_names:
        kind = _kind(name)
        found[kind] = found.get(kind, 0.0) + answer.table.column(name).nbytes / NUM_POSITIONS
    return found


def payload_note(spec: TargetSpec, *, hidden_width: int) -> str:
    """A sentence for the start of a run."""
    found = bytes_per_token(spec, hidden_width=hidden_width)
    parts = ", ".join(f"{kind} {round(size):,}" for kind, size in found.items())
    return f"a token costs {round(sum(found.values())):,} bytes from the teacher: {parts}"


def _kind(column: str) -> str:
    if column.startswith("hidden_"):
        return "hidden states"
    if column.startswith("top_logprobs"):
        return "log-probabilities"
    return "ids" if column == "top_ids" else "masses and label"


def _arrays(spec: TargetSpec, hidden_width: int) -> TargetArrays:
    step = spec.shared_vocab // spec.top_k
    shape = (NUM_POSITIONS, hidden_width)
    state_type = np.uint16 if spec.hidden_encoding == "bf16" else np.float32
    flat_N = np.zeros(NUM_POSITIONS, np.float32)
    return TargetArrays(
        ids_NK=np.tile(np.arange(spec.top_k) * step, (NUM_POSITIONS, 1)),
        logprobs_NK=np.full((NUM_POSITIONS, spec.top_k), -np.log(2 * spec.top_k), np.float32),
        log_tail_NS=np.full((NUM_POSITIONS, len(spec.temperatures)), -np.log(2), np.float32),
        label_logprob_N=flat_N - 1,
        hidden_ND={layer: np.zeros(shape, state_type) for layer in spec.hidden_layers},
        entropy_N=flat_N if spec.entropy else None,
    )

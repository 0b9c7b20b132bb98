"""How an answer of drawn ids is written: what is kept exactly, and nothing of what follows from it.

Ids ascend and may repeat. With `sampled` every id has the weight 1 / K, and a repeated one counts
as often as it stands. With `threshold` a bit says which ids are kept exactly, those have their
log-probabilities, row by row end to end, and all others share the mass outside them in equal parts;
a repeated id marks an empty slot, whose weight is 0 because nothing is left to share.

N positions   K ids kept per position   H ids kept exactly, of all positions   R rows
Log-probabilities are nats at the temperature of the draw.
"""

from typing import Literal

import numpy as np

from shared.encoding import LARGEST, in_float16, log_kept_mass, sorted_by_id
from shared.errors import TeacherError

EXACT, LOGPROBS, RANGE = "exact", "exact_logprobs", "exact_logprobs_range"
Encoding = Literal["fp16", "int8", "fp32"]


def drawn_in_order(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids ascending and the log-probabilities of those kept exactly, -inf for the others.

    Without a tail such others are empty slots, which repeat the largest id of the position. Raises
    TeacherError for an id outside [0, vocab).
    """
    empty_NK = (log_tail_N == -np.inf)[:, None] & (logprobs_NK == -np.inf)
    largest_N1 = np.where(empty_NK, -1, ids_NK).max(axis=1, keepdims=True)
    # They come after the id they repeat: selections name the most likely ids first.
    return sorted_by_id(np.where(empty_NK, largest_N1, ids_NK), logprobs_NK, vocab)


def exact_columns(logprobs_NK: np.ndarray, encoding: Encoding) -> dict[str, np.ndarray]:
    """The bits [N, ceil(K / 8)], the log-probabilities [H] and, in int8, their range [N]."""
    exact_NK = logprobs_NK > -np.inf
    columns = {EXACT: np.packbits(exact_NK, axis=1, bitorder="little")}
    if encoding == "fp32":
        return columns | {LOGPROBS: logprobs_NK[exact_NK]}
    if encoding == "fp16":
        return columns | {LOGPROBS: in_float16(logprobs_NK[exact_NK])}
    below_NK = np.where(exact_NK, logprobs_NK.max(axis=1, keepdims=True), 0) - np.where(
        exact_NK, logprobs_NK, 0
    )
    range_N = np.minimum(below_NK.max(axis=1), LARGEST).astype(np.float16)
    step_N1 = (np.where(range_N > 0, range_N, 1).astype(np.float32) / 255)[:, None]
    steps_NK = np.rint(np.minimum(below_NK / step_N1, 255)).astype(np.uint8)
    return columns | {LOGPROBS: steps_NK[exact_NK], RANGE: range_N}


def num_exact(exact_NW: np.ndarray) -> np.ndarray:
    """Ids kept exactly at each position [N], from the bits."""
    return np.bitwise_count(exact_NW).sum(axis=1, dtype=np.int64)


def log_weights(
    exact_NW: np.ndarray,
    written_H: np.ndarray,
    range_N: np.ndarray | None,
    log_tail_N: np.ndarray,
    num_ids: int,
) -> np.ndarray:
    """Log-weights of all ids, float32 [N, K]; the weights of a position sum to 1.

    The ids kept exactly share what the tail leaves. Raises TeacherError where bits and
    log-probabilities do not fit.
    """
    exact_NK = np.unpackbits(exact_NW, axis=1, count=num_ids, bitorder="little").view(bool)
    if exact_NK.sum() != len(written_H):
        raise TeacherError(
            f"an answer keeps {exact_NK.sum()} ids exactly and has {len(written_H)} "
            "log-probabilities; it is damaged, ask for it again"
        )
    level_NK = np.zeros(exact_NK.shape)
    level_NK[exact_NK] = written_H
    if range_N is not None:
        level_NK *= range_N.astype(np.float64)[:, None] / -255
    level_NK[~exact_NK] = -np.inf
    count_N, mass_N = exact_NK.sum(axis=1), np.exp(level_NK).sum(axis=1)
    shift_N = log_kept_mass(log_tail_N) - np.log(np.where(count_N > 0, mass_N, 1))
    share_N = log_tail_N - np.log(np.maximum(num_ids - count_N, 1))
    weights_NK = np.where(exact_NK, level_NK + shift_N[:, None], share_N[:, None])
    return weights_NK.astype(np.float32)


def equal_log_weights(num: int, num_ids: int) -> np.ndarray:
    """Log-weights of draws with replacement, float32 [N, K]."""
    return np.full((num, num_ids), -np.log(num_ids), np.float32)

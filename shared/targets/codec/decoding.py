"""From what travels back to log-probabilities, where the wire lost some of their precision.

Likeliest ids: int8 says how far below the top each one is, and all share what the tail leaves.
Drawn ids may repeat. With `sampled` every one has the weight 1 / K, and a repeated one counts as
often as it stands. With `threshold` a bit says which are kept exactly, those have their
log-probabilities, position by position end to end, and all others share the mass outside them in
equal parts; a repeated id marks an empty slot, whose weight is 0 because nothing is left to share.

N positions   K ids kept per position   H ids kept exactly, of all positions   W bytes of K bits
Log-probabilities are nats; of drawn ids, at the temperature of the draw.
"""

import numpy as np

from shared.errors import TeacherError

EXACT, LOGPROBS, RANGE = "exact", "exact_logprobs", "exact_logprobs_range"
LOGPROB_STEPS = 255  # of int8, from the most likely id of a position to the least likely
# The tail is a float32: what it leaves to the kept ids is known no finer than this.
LEAST_KEPT_MASS = 2.0**-24


def logprobs_from_int8(
    steps_NK: np.ndarray, range_N: np.ndarray, log_tail_N: np.ndarray
) -> np.ndarray:
    """Log-probabilities [N, K] of steps from a position's top and the range in nats of all steps:
    within half a step, and the kept ids share what the tail leaves exactly."""
    below_NK = steps_NK * (-range_N.astype(np.float32) / LOGPROB_STEPS)[:, None]
    level_N = _log_kept_mass(log_tail_N) - np.log(np.exp(below_NK).sum(axis=1))
    return below_NK + level_N.astype(np.float32)[:, None]


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
    num, count_N = len(exact_NK), exact_NK.sum(axis=1)
    at_H, level_H = np.repeat(np.arange(num), count_N), written_H.astype(np.float64)
    if range_N is not None:
        level_H *= range_N.astype(np.float64)[at_H] / -LOGPROB_STEPS
    mass_N = np.bincount(at_H, np.exp(level_H), num)
    shift_N = _log_kept_mass(log_tail_N) - np.log(np.where(count_N > 0, mass_N, 1))
    share_N = log_tail_N - np.log(np.maximum(num_ids - count_N, 1))
    weights_NK = np.repeat(share_N.astype(np.float32), num_ids).reshape(num, num_ids)
    weights_NK[exact_NK] = level_H + shift_N[at_H]
    return weights_NK


def equal_log_weights(num: int, num_ids: int) -> np.ndarray:
    """Log-weights of draws with replacement, float32 [N, K]."""
    return np.full((num, num_ids), -np.log(num_ids), np.float32)


def _log_kept_mass(log_tail_N: np.ndarray) -> np.ndarray:
    """log(1 - tail) in float64, finite also where rounding leaves nothing."""
    mass_N = -np.expm1(log_tail_N.astype(np.float64))
    return np.log(np.maximum(mass_N, LEAST_KEPT_MASS))

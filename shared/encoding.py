"""Narrow types for log-probabilities on the wire, where some of the teacher's precision is lost.

N positions   K ids kept per position   V vocabulary   S temperatures
Log-probabilities are nats at temperature 1, normalised over the teacher's whole vocabulary.
"""

from collections.abc import Mapping

import numpy as np

from shared.errors import TeacherError

LARGEST = np.finfo(np.float16).max
# The tail is a float32: what it leaves to the kept ids is known no finer than this.
LEAST_KEPT_MASS = 2.0**-24
UNSOUND_LEVEL = 0.05  # nats between the kept mass and what the tail leaves, where that is much


def refuse_non_finite(named: Mapping[str, np.ndarray | None], *, log_tail_NS: np.ndarray) -> None:
    """Raise TeacherError unless all are finite, where a tail may be -inf: nothing is left (k = V).

    bfloat16 comes as the bits that it shares with a float32's upper half.
    """
    for name, values in named.items():
        if values is not None and not _are_finite(values):
            raise TeacherError(f"the teacher computed a non-finite {name}")
    if np.isnan(log_tail_NS).any() or (log_tail_NS > 0).any():
        raise TeacherError("the teacher computed a tail mass outside [0, 1]")


def sorted_by_id(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both in the order of ascending ids; repeated ids stay in the order they had.

    Raises TeacherError for an id outside [0, vocab).
    """
    if ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() < vocab:
        raise TeacherError(
            f"the teacher selected ids {ids_NK.min()} to {ids_NK.max()} of {vocab:,} shared ones"
        )
    place_bits = int(ids_NK.shape[1]).bit_length()
    keys_NK = (ids_NK.astype(np.int64) << place_bits) | np.arange(ids_NK.shape[1])
    keys_NK.sort(axis=1)
    order_NK = keys_NK & ((1 << place_bits) - 1)
    return keys_NK >> place_bits, np.take_along_axis(logprobs_NK, order_NK, axis=1)


def placed_by_id(ids_NV: np.ndarray, logprobs_NV: np.ndarray) -> np.ndarray:
    """Log-probabilities of a whole vocabulary by id. Raises TeacherError where one is missing."""
    num, vocab = logprobs_NV.shape
    if np.array_equal(ids_NV, np.broadcast_to(np.arange(vocab), (num, vocab))):
        return logprobs_NV
    by_id_NV = np.full(logprobs_NV.shape, np.nan, np.float32)
    np.put_along_axis(by_id_NV, ids_NV, logprobs_NV, axis=1)
    if np.isnan(by_id_NV).any():
        raise TeacherError("the teacher ships the whole vocabulary and names an id twice")
    return by_id_NV


def in_float16(logprobs: np.ndarray) -> np.ndarray:
    """Rounded, never below the smallest number: such a probability is 0 anyway."""
    return np.maximum(logprobs, -LARGEST).astype(np.float16)


def logprobs_in_int8(
    logprobs_NK: np.ndarray, log_tail_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """255 equal steps down from each position's most likely id to its least likely: the steps
    [N, K], uint8, and the distance in nats from top to bottom [N], float16.

    The level of the top is not written, since the kept ids share what the tail leaves. Raises
    TeacherError where they do not.
    """
    top_N1 = logprobs_NK.max(axis=1, keepdims=True)
    below_NK = top_N1 - logprobs_NK
    range_N = np.minimum(below_NK.max(axis=1), LARGEST).astype(np.float16)
    _refuse_unsound(np.exp(logprobs_NK).sum(axis=1), log_tail_N)
    step_N1 = (np.where(range_N > 0, range_N, 1).astype(np.float32) / 255)[:, None]
    steps_NK = np.rint(np.minimum(below_NK / step_N1, 255))
    return steps_NK.astype(np.uint8), range_N


def logprobs_from_int8(
    steps_NK: np.ndarray, range_N: np.ndarray, log_tail_N: np.ndarray
) -> np.ndarray:
    """The inverse, float32 [N, K]: within half a step, and the kept ids share what the tail leaves
    exactly."""
    below_NK = steps_NK * (-range_N.astype(np.float32) / 255)[:, None]
    level_N = log_kept_mass(log_tail_N) - np.log(np.exp(below_NK).sum(axis=1))
    return below_NK + level_N.astype(np.float32)[:, None]


def _are_finite(values: np.ndarray) -> bool:
    if values.dtype == np.uint16:
        return bool(((values & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values).all())


def log_kept_mass(log_tail_N: np.ndarray) -> np.ndarray:
    """log(1 - tail) in float64, finite also where rounding leaves nothing."""
    mass_N = -np.expm1(log_tail_N.astype(np.float64))
    return np.log(np.maximum(mass_N, LEAST_KEPT_MASS))


def _refuse_unsound(kept_mass_N: np.ndarray, log_tail_N: np.ndarray) -> None:
    left_N = -np.expm1(log_tail_N.astype(np.float64))
    off_N = np.abs(np.log(np.maximum(kept_mass_N, LEAST_KEPT_MASS)) - log_kept_mass(log_tail_N))
    if (off_N[left_N > 1e-3] > UNSOUND_LEVEL).any():
        raise TeacherError(
            "the teacher's kept and tail probabilities do not sum to 1, which targets.encoding "
            "int8 builds on; use fp16"
        )

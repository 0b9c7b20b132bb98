"""Uniform numbers for selectors that draw: the same for a row and a draw, whoever asks and when.

They depend on the seed, the row's tokens, the number of its draw and the position alone, not on
the other rows of a unit, the replica that answers, or how often it was asked.

N positions with loss, all rows end to end   U numbers of a position
"""

import numpy as np

from shared.data.rows import Rows
from shared.permutation import key_of, mixed


def uniforms(rows: Rows, *, seed: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) for every position with loss, float64 [N, count]."""
    keys = np.array([key_of(seed, key.hex()) for key in rows.hashes()], np.uint64)
    num_R = rows.num_loss_tokens()
    position_N = np.concatenate([np.zeros(0, np.int64), *map(np.arange, num_R)])
    key_N = mixed(np.repeat(keys, num_R), position_N)
    bits_NU = mixed(key_N[:, None], np.arange(count))
    return (bits_NU >> np.uint64(11)) * 2.0**-53

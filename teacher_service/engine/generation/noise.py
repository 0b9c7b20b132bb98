"""Gumbel noise as a function of a key: the same numbers whatever stands beside them in a batch,
made on the device where the logits are.

B openings   V vocabulary
"""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014): the step of its state and the factors of its finaliser.
_STEP, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1
_AT_ONCE = 2**21  # numbers; temporaries of more bytes are fresh memory at every call on a CPU


def gumbel(keys_B: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel numbers [B, V], float32: those of id v are SplitMix64's output number v from
    the state `keys_B` (int64). Every number that float32 has near 0 can be the uniform one behind
    them, so that the likeliest draws are as fine as the others."""
    rows = max(1, _AT_ONCE // vocab)
    found = [_gumbel(some_B, vocab) for some_B in keys_B.split(rows)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _gumbel(keys_B: Tensor, vocab: int) -> Tensor:
    step = _signed(_STEP)
    bits_BV = torch.arange(1, vocab + 1, device=keys_B.device).mul_(step) + keys_B[:, None]
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        # `>>` of signed numbers repeats the sign: the mask makes it the shift of unsigned ones.
        bits_BV ^= (bits_BV >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        bits_BV.mul_(_signed(factor))
    uniform_BV = bits_BV.bitwise_and_(2**63 - 1).float().add_(0.5).mul_(2.0**-63)
    return uniform_BV.clamp_(max=_BELOW_ONE).neg_().log1p_().neg_().log_().neg_()


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number

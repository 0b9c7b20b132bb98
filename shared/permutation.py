"""Keyed permutations that need no memory: integer arithmetic alone, so every machine agrees.

n elements, each with its own size and key
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def key_of(*parts: int | str) -> np.uint64:
    """A 64-bit key from plain values; free text belongs last."""
    text = "/".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))


def mixed(key_n: np.ndarray | np.uint64, index_n: np.ndarray | int) -> np.ndarray:
    """Element `index` of the stream of `key`, uint64 (splitmix64: Steele, Lea and Flood 2014)."""
    state_n = np.atleast_1d(key_n) + _GOLDEN * np.asarray(index_n, np.uint64)
    state_n = (state_n ^ (state_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_n = (state_n ^ (state_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state_n ^ (state_n >> np.uint64(31))


def permuted(offset_n: np.ndarray, *, size_n: np.ndarray, key_n: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, size) chosen by `key` sends each offset, int64.

    A Feistel network permutes the next power of four; values that leave [0, size) walk on
    along their cycle until they return (Black and Rogaway 2002), fewer than 4 times on average.
    """
    value_n = offset_n.astype(np.uint64)
    outside = np.arange(len(value_n))
    while len(outside):
        value_n[outside] = _feistel(value_n[outside], size_n[outside], key_n[outside])
        outside = outside[value_n[outside] >= size_n[outside].astype(np.uint64)]
    return value_n.astype(np.int64)


def shuffled(size: int, *, key: np.uint64) -> np.ndarray:
    """A permutation of [0, size), int64, chosen by `key`."""
    return np.argsort(mixed(key, np.arange(size)), kind="stable")


def _feistel(value_n: np.ndarray, size_n: np.ndarray, key_n: np.ndarray) -> np.ndarray:
    bits_n = np.frexp((size_n - 1).astype(np.float64))[1]  # bit length, exact below 2**53
    half_n = np.maximum(1, (bits_n + 1) // 2).astype(np.uint64)
    mask_n = (np.uint64(1) << half_n) - np.uint64(1)
    left_n, right_n = value_n >> half_n, value_n & mask_n
    for round_ in range(_ROUNDS):
        noise_n = mixed(mixed(key_n, round_), right_n) & mask_n
        left_n, right_n = right_n, left_n ^ noise_n
    return (left_n << half_n) | right_n

"""Sorted ids in the fewest bytes: the code of Elias (1974) and Fano (1971), of a fixed size.

The order of a selection says nothing, so its ids are sorted and written as K differences: the
low bits of every id as they are, the high parts as a row of bits in which the i-th 1 stands at
place high_i + i. For K ids below V with l = log2(V / K) low bits that is about l + 2 bits an id,
within half a bit of the least possible, and the same number of bytes for every selection.

N positions   K ids of a position   V ids in all   W bytes of a position
"""

from dataclasses import dataclass, field

import numpy as np

from shared.errors import TeacherError

CHUNK_BITS = 2**20  # high bits that are unpacked at once, a byte each


@dataclass(frozen=True, slots=True)
class EliasFano:
    """How K ids below V are written. One position is its high bits, then the low bits: whole
    bytes of all ids, the least significant first, then single bits of all ids; a part that does
    not fill its last byte ends in zeros."""

    num_ids: int  # K
    vocab: int  # V
    low_bits: int = field(init=False)

    def __post_init__(self) -> None:
        candidates = range(int(self.vocab - 1).bit_length(), -1, -1)
        best = min(candidates, key=lambda low_bits: sum(self._part_bytes(low_bits)))
        object.__setattr__(self, "low_bits", best)

    @property
    def num_bytes(self) -> int:
        """Bytes of a position: W."""
        return sum(self._part_bytes(self.low_bits))

    @property
    def places(self) -> int:
        """Bits of the high part."""
        return self.num_ids + (self.vocab - 1 >> self.low_bits)

    def encode(self, ids_NK: np.ndarray) -> np.ndarray:
        """Bytes [N, W] of ids that ascend along K, repeats allowed, and are below V."""
        out_NW = np.empty((len(ids_NK), self.num_bytes), np.uint8)
        for part in self._chunks(len(ids_NK)):
            out_NW[part] = np.concatenate(self._encoded(ids_NK[part].astype(np.int64)), axis=1)
        return out_NW

    def decode(self, bytes_NW: np.ndarray) -> np.ndarray:
        """Ids [N, K], int64, ascending. Raises TeacherError for bytes that no ids give."""
        if bytes_NW.shape[1] != self.num_bytes:
            raise TeacherError(
                f"an answer writes {self.num_ids} of {self.vocab:,} ids in {bytes_NW.shape[1]} "
                f"bytes, they take {self.num_bytes}; it is damaged or of another version"
            )
        ids_NK = np.empty((len(bytes_NW), self.num_ids), np.int64)
        for part in self._chunks(len(bytes_NW)):
            ids_NK[part] = self._high(bytes_NW[part]) | self._low(bytes_NW[part])
        if ids_NK.size and ids_NK.max() >= self.vocab:
            raise TeacherError(
                f"an answer names id {ids_NK.max()} where {self.vocab:,} ids are shared; it is "
                "damaged, ask for it again"
            )
        return ids_NK

    def _encoded(self, ids_NK: np.ndarray) -> list[np.ndarray]:
        num, places = len(ids_NK), self.places
        set_NK = (ids_NK >> self.low_bits) + np.arange(self.num_ids) + _starts(num, places)
        bits = np.zeros(num * places, np.uint8)
        bits[set_NK.reshape(-1)] = 1
        whole, single = divmod(self.low_bits, 8)
        parts = [_packed(bits.reshape(num, places))]
        parts += [(ids_NK >> 8 * byte).astype(np.uint8) for byte in range(whole)]
        if single:
            low_NK = (ids_NK >> 8 * whole).astype(np.uint8)
            planes = [(low_NK >> bit) & 1 for bit in range(single)]
            parts.append(_packed(np.concatenate(planes, axis=1)))
        return parts

    def _high(self, bytes_NW: np.ndarray) -> np.ndarray:
        num, places = len(bytes_NW), self.places
        end = self._part_bytes(self.low_bits)[0]
        set_ = np.flatnonzero(_unpacked(bytes_NW[:, :end], places).view(bool))
        if len(set_) == num * self.num_ids:
            set_NK = set_.reshape(num, self.num_ids) - _starts(num, places)
            if not num or (set_NK[:, 0].min() >= 0 and set_NK[:, -1].max() < places):
                return (set_NK - np.arange(self.num_ids)) << self.low_bits
        raise TeacherError(
            f"an answer does not name {self.num_ids} ids at every position; it is damaged, ask for "
            "it again"
        )

    def _low(self, bytes_NW: np.ndarray) -> np.ndarray:
        num, size = len(bytes_NW), self.num_ids
        whole, single = divmod(self.low_bits, 8)
        start = self._part_bytes(self.low_bits)[0]
        low_NK = np.zeros((num, size), np.int64)
        for byte in range(whole):
            plane_NK = bytes_NW[:, start + byte * size : start + (byte + 1) * size]
            low_NK |= plane_NK.astype(np.int64) << 8 * byte
        planes = _unpacked(bytes_NW[:, start + whole * size :], single * size)
        for bit in range(single):
            plane_NK = planes[:, bit * size : (bit + 1) * size]
            low_NK |= plane_NK.astype(np.int64) << 8 * whole + bit
        return low_NK

    def _part_bytes(self, low_bits: int) -> tuple[int, int, int]:
        """Bytes of the high bits, the whole low bytes and the single low bits of a position."""
        whole, single = divmod(low_bits, 8)
        high = self.num_ids + (self.vocab - 1 >> low_bits)
        return -(-high // 8), whole * self.num_ids, -(-single * self.num_ids // 8)

    def _chunks(self, num: int) -> list[slice]:
        step = max(1, CHUNK_BITS // self.places)
        return [slice(first, min(first + step, num)) for first in range(0, num, step)]


def _starts(num: int, places: int) -> np.ndarray:
    """Where each position's bits begin, all end to end [N, 1]."""
    return np.arange(num)[:, None] * places


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=1, bitorder="little")


def _unpacked(packed: np.ndarray, count: int) -> np.ndarray:
    return np.unpackbits(packed, axis=1, count=count, bitorder="little")

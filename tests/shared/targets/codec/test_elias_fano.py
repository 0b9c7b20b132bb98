"""Laws of the ids' code: exact, of a fixed size near the least possible, and damage is refused."""

import math

import numpy as np
import pytest

from shared.errors import TeacherError
from shared.targets.codec.elias_fano import CHUNK_BITS, EliasFano

VOCABS = (3, 4, 255, 256, 257, 1000, 4096, 65_537, 151_936, 200_000)


def sizes(vocab: int) -> list[int]:
    """Selection sizes from 1 to the whole vocabulary."""
    return sorted({k for k in (1, 2, 7, 32, 64, 100, vocab // 3, vocab - 1, vocab) if k <= vocab})


def selections(num_ids: int, vocab: int) -> np.ndarray:
    """Ascending ids: drawn, at either end, in dense runs, evenly spread, repeated."""
    rng = np.random.default_rng(num_ids * 7 + vocab)
    drawn = [np.sort(rng.choice(vocab, num_ids, replace=False)) for _ in range(3)]
    run = np.arange(num_ids)
    middle = (vocab - num_ids) // 2
    ends = np.r_[run[: num_ids // 2], vocab - num_ids + run[num_ids // 2 :]]
    spread = run * vocab // num_ids
    repeated = [np.full(num_ids, vocab - 1), np.zeros(num_ids, int)]
    return np.stack([*drawn, run, vocab - num_ids + run, middle + run, ends, spread, *repeated])


@pytest.mark.parametrize("vocab", VOCABS)
def test_every_selection_comes_back_exactly(vocab: int) -> None:
    for num_ids in sizes(vocab):
        code, ids_NK = EliasFano(num_ids, vocab), selections(num_ids, vocab)
        written_NW = code.encode(ids_NK)
        assert written_NW.shape == (len(ids_NK), code.num_bytes)
        found_NK = code.decode(written_NW)
        assert found_NK.dtype == np.int64
        np.testing.assert_array_equal(found_NK, ids_NK, err_msg=f"{num_ids} of {vocab}")


def test_every_selection_of_a_small_vocabulary_comes_back_exactly() -> None:
    for vocab in range(3, 11):
        for num_ids in range(1, vocab + 1):
            masks = np.arange(2**vocab)[:, None] >> np.arange(vocab) & 1
            masks = masks[masks.sum(axis=1) == num_ids]
            ids_NK = np.nonzero(masks)[1].reshape(-1, num_ids)
            assert len(ids_NK) == math.comb(vocab, num_ids)
            code = EliasFano(num_ids, vocab)
            written_NW = code.encode(ids_NK)
            np.testing.assert_array_equal(code.decode(written_NW), ids_NK)
            assert len(np.unique(written_NW, axis=0)) == len(ids_NK)


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_size_is_the_formulas_and_within_a_bit_of_the_least_possible(vocab: int) -> None:
    for num_ids in sizes(vocab):
        code = EliasFano(num_ids, vocab)
        low, high = code.low_bits, num_ids + (vocab - 1 >> code.low_bits)
        whole, single = divmod(low, 8)
        expected = math.ceil(high / 8) + num_ids * whole + math.ceil(num_ids * single / 8)
        assert code.num_bytes == expected
        if num_ids <= vocab // 3:
            least_bits = math.log2(math.comb(vocab, num_ids))
            assert 8 * code.num_bytes <= least_bits + num_ids + 16, (num_ids, vocab)


@pytest.mark.parametrize(
    ("num_ids", "vocab", "num_bytes"),
    [(64, 151_936, 106), (32, 151_936, 57), (64, 4096, 64), (32, 4096, 36), (64, 32_000, 88)],
)
def test_sizes_that_are_promised(num_ids: int, vocab: int, num_bytes: int) -> None:
    assert EliasFano(num_ids, vocab).num_bytes == num_bytes


def test_the_bytes_of_a_selection_are_fixed_for_good() -> None:
    """High parts 0, 0, 1, 3 set places 0, 1, 3, 6; low bytes; bits 8 of all ids, then bits 9."""
    code = EliasFano(4, 4000)
    assert code.low_bits == 10
    assert code.encode(np.array([[3, 256, 1025, 3999]])).tobytes().hex() == "4b0300019f8a"


def test_more_positions_than_a_chunk_holds_come_back_in_order() -> None:
    code = EliasFano(3, 50_000)
    num = 2 * CHUNK_BITS // 3
    first_N = np.arange(num) % 49_000
    ids_NK = np.stack([first_N, first_N + 1, first_N + 900], axis=1)
    np.testing.assert_array_equal(code.decode(code.encode(ids_NK)), ids_NK)


def test_no_position_is_no_bytes() -> None:
    code = EliasFano(64, 151_936)
    assert code.encode(np.empty((0, 64), np.int64)).shape == (0, 106)
    assert code.decode(np.empty((0, 106), np.uint8)).shape == (0, 64)


@pytest.mark.parametrize("width", [0, 105, 107])
def test_bytes_of_another_width_are_refused(width: int) -> None:
    with pytest.raises(TeacherError, match=f"in {width} bytes, they take 106"):
        EliasFano(64, 151_936).decode(np.zeros((2, width), np.uint8))


def test_a_flipped_bit_of_the_high_part_is_always_refused() -> None:
    code = EliasFano(16, 4096)
    written_NW = code.encode(selections(16, 4096))
    high_bits = 16 + (4095 >> code.low_bits)
    for bit in range(high_bits):
        damaged_NW = written_NW.copy()
        damaged_NW[4, bit // 8] ^= 1 << bit % 8
        with pytest.raises(TeacherError, match="does not name 16 ids at every position"):
            code.decode(damaged_NW)


def test_a_bit_that_moves_from_one_position_to_the_next_is_refused() -> None:
    code = EliasFano(16, 4096)
    written_NW = code.encode(selections(16, 4096))
    written_NW[3, 0] ^= 1  # the run that starts at id 0 loses its first id
    written_NW[4, 0] ^= 1  # and the run at the other end gains one
    with pytest.raises(TeacherError, match="does not name 16 ids"):
        code.decode(written_NW)


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    code = EliasFano(4, 1001)
    written_NW = code.encode(np.array([[1, 2, 3, 1000]]))
    beyond_NW = EliasFano(4, 1024).encode(np.array([[1, 2, 3, 1001]]))
    assert code.num_bytes == beyond_NW.shape[1]
    assert code.decode(written_NW)[0, 3] == 1000
    with pytest.raises(TeacherError, match=r"names id 1001 where 1,001 ids are shared"):
        code.decode(beyond_NW)


def test_random_bytes_never_decode_to_ids_out_of_range() -> None:
    code, rng = EliasFano(4, 700), np.random.default_rng(0)
    accepted = 0
    for written_NW in rng.integers(0, 256, (3000, 1, code.num_bytes), np.uint8):
        try:
            ids_NK = code.decode(written_NW)
        except TeacherError:
            continue
        accepted += 1
        assert ids_NK.min() >= 0
        assert ids_NK.max() < 700
    assert 0 < accepted < 2900

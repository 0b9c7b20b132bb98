"""Laws of the memoryless permutations."""

import numpy as np
import pytest
from scipy import stats

from shared.permutation import key_of, mixed, permuted, shuffled


def _image(size: int, *, key: np.uint64) -> np.ndarray:
    return permuted(
        np.arange(size), size_n=np.full(size, size), key_n=np.full(size, key, np.uint64)
    )


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1023, 4096, 5000])
def test_every_element_is_hit_exactly_once(size: int) -> None:
    assert np.array_equal(np.sort(_image(size, key=key_of(7, size))), np.arange(size))


@pytest.mark.parametrize("size", [10**9, 2**40 + 1])
def test_a_huge_set_is_permuted_without_memory(size: int) -> None:
    offset_n = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    image_n = permuted(
        offset_n, size_n=np.full(10_000, size), key_n=np.full(10_000, key_of(1), np.uint64)
    )
    assert len(np.unique(image_n)) == 10_000
    assert image_n.min() >= 0
    assert image_n.max() < size
    assert stats.kstest(image_n / size, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_each_place_is_equally_likely_over_keys_even_in_tiny_sets(size: int) -> None:
    num_keys = 20_000
    key_n = mixed(key_of("keys"), np.arange(num_keys))
    for offset in range(size):
        image_n = permuted(np.full(num_keys, offset), size_n=np.full(num_keys, size), key_n=key_n)
        assert stats.chisquare(np.bincount(image_n, minlength=size)).pvalue > 1e-4


def test_elements_of_different_sets_do_not_disturb_each_other() -> None:
    size_n, key_n = np.array([3, 1000, 10**9]), mixed(key_of(5), np.arange(3))
    together_n = permuted(np.array([2, 999, 123]), size_n=size_n, key_n=key_n)
    alone = [
        int(permuted(np.array([o]), size_n=size_n[i : i + 1], key_n=key_n[i : i + 1])[0])
        for i, o in enumerate((2, 999, 123))
    ]
    assert together_n.tolist() == alone


def test_the_stream_is_published_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(np.uint64(0), np.arange(1, 4)).tolist() == published


def test_the_numbers_are_the_same_on_every_machine_and_in_every_release() -> None:
    assert int(key_of(0, "domain", "math")) == 6511276938319345771
    assert shuffled(8, key=key_of(1, "block", 2)).tolist() == [3, 0, 1, 6, 7, 4, 5, 2]
    assert _image(10, key=key_of(3)).tolist() == [7, 2, 0, 6, 1, 9, 8, 3, 4, 5]

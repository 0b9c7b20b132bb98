"""What stored bytes say: numbers on disk mean the same whatever wrote them."""

import numpy as np

from shared.targets.codec.decoding import equal_log_weights, log_weights, logprobs_from_int8


def test_int8_is_255ths_of_the_way_down_and_the_kept_share_what_the_tail_leaves() -> None:
    steps_NK = np.array([[0, 51, 255]], np.uint8)
    found_NK = logprobs_from_int8(steps_NK, np.array([10], np.float16), np.log([0.25]))
    np.testing.assert_allclose(found_NK - found_NK[0, 0], [[0, -2, -10]], atol=1e-5)
    np.testing.assert_allclose(np.exp(found_NK).sum(), 0.75, rtol=1e-6)


def test_exact_ids_have_their_own_weight_and_drawn_ones_equal_parts_of_the_tail() -> None:
    """Bits come least significant first: of four ids the second and the fourth are exact."""
    exact_NW = np.array([[0b1010]], np.uint8)
    written_H = np.log([0.4, 0.2]).astype(np.float32)
    found_NK = log_weights(exact_NW, written_H, None, np.log([0.4]).astype(np.float32), 4)
    np.testing.assert_allclose(np.exp(found_NK), [[0.2, 0.4, 0.2, 0.2]], rtol=1e-6)
    steps_H = np.array([0, 255], np.uint8)
    told_NK = log_weights(exact_NW, steps_H, np.array([2], np.float16), np.log([0.4]), 4)
    np.testing.assert_allclose(told_NK[0, 1] - told_NK[0, 3], 2, atol=1e-6)
    np.testing.assert_allclose(np.exp(told_NK).sum(), 1, rtol=1e-6)


def test_draws_with_replacement_weigh_the_same() -> None:
    np.testing.assert_allclose(np.exp(equal_log_weights(2, 8)), np.full((2, 8), 1 / 8))

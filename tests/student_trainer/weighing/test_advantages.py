"""Which rewards a token's advantage is made of."""

from types import SimpleNamespace

import numpy as np
import pytest

from shared.config.losses import PolicyGradient
from student_trainer.weighing.advantages import Advantages, advantages
from student_trainer.weighing.weigher import StepView

CREDITS = ("token", "return", "later_mean", "remaining_mean", "discounted_mean")
REWARD_T = np.array([0.1, -0.2, 0.3])


@pytest.mark.parametrize(
    ("credit", "discount", "expected"),
    [
        ("token", 1.0, [0.1, -0.2, 0.3]),
        ("return", 0.95, [0.18075, 0.085, 0.3]),
        ("remaining_mean", 0.95, [0.06025, 0.0425, 0.3]),
        ("discounted_mean", 0.95, [0.063365, 0.043590, 0.3]),
        ("later_mean", 1.0, [0.05, 0.3, 0.0]),
    ],
)
def test_the_three_conventions_and_others_have_their_golden_vectors(credit, discount, expected):
    found = advantages(REWARD_T, credit=credit, discount=discount)
    np.testing.assert_allclose(found, expected, atol=5e-7)


@pytest.mark.parametrize("credit", ["remaining_mean", "discounted_mean", "later_mean"])
def test_a_constant_reward_gives_itself_under_a_mean(credit):
    found = advantages(np.full(7, -0.3), credit=credit, discount=1.0)
    np.testing.assert_allclose(found[:-1], -0.3)
    assert found[-1] == pytest.approx(0.0 if credit == "later_mean" else -0.3)


@pytest.mark.parametrize("credit", CREDITS)
def test_no_reward_is_no_advantage_and_an_empty_text_has_none(credit):
    assert not advantages(np.zeros(5), credit=credit, discount=0.9).any()
    assert len(advantages(np.zeros(0), credit=credit, discount=0.9)) == 0


@pytest.mark.parametrize("credit", CREDITS)
def test_a_reward_changes_no_advantage_of_a_later_token(credit):
    before = advantages(REWARD_T, credit=credit, discount=0.8)
    after = advantages(REWARD_T + np.array([0, 5.0, 0]), credit=credit, discount=0.8)
    assert before[2] == after[2]
    assert (before[1] == after[1]) == (credit == "later_mean")
    assert (before[0] == after[0]) == (credit == "token")


def unit(reward_N: list[float], version_R: list[int]) -> SimpleNamespace:
    """A unit of rows of two tokens each, by this version, at rewards of these."""
    size = len(reward_N)
    rows = SimpleNamespace(
        versions=lambda: np.array(version_R), own_logprobs=lambda: np.zeros(size, np.float32)
    )
    place_N = np.arange(size) // 2
    layout = SimpleNamespace(row_N=place_N, document_N=place_N)
    return SimpleNamespace(
        rows=rows, layout=layout, of_teacher=lambda look: np.array(reward_N, np.float32)
    )


def weighed(units: list[SimpleNamespace], *, whiten: bool) -> list[list[float]]:
    """Advantages of a worker beside another one with the same."""
    view = StepView(units, gather=lambda own: [own, own])  # type: ignore[arg-type]
    found = Advantages(PolicyGradient(whiten=whiten)).weigh(view)
    return [columns["advantage_N"].tolist() for columns in found]


def test_white_advantages_are_those_of_a_micro_batch_over_all_workers():
    """What the student did not write counts nowhere."""
    units = [unit([1, 3, 9, 9], [4, -1]), unit([-2, -2], [4]), unit([5, 5], [-1])]
    assert weighed(units, whiten=False) == [[1, 3, 0, 0], [-2, -2], [0, 0]]
    first, second, third = weighed(units, whiten=True)
    np.testing.assert_allclose(first, [-1, 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [0, 0], atol=1e-6)  # how far off it is goes away
    assert third == [0, 0]
    scaled, *_ = weighed([unit([7.5, 8.5, 0, 0], [4, -1])], whiten=True)
    np.testing.assert_allclose(scaled, first, rtol=1e-5)  # so do the scale and shift of rewards


def test_what_is_far_from_0_is_white_too():
    reward_N = (np.random.default_rng(0).normal(-30, 0.01, 4000)).astype(np.float32)
    (found,) = weighed([unit(reward_N.tolist(), [1] * 2000)], whiten=True)
    assert np.std(found) == pytest.approx(1, rel=1e-3)
    assert np.mean(found) == pytest.approx(0, abs=1e-5)

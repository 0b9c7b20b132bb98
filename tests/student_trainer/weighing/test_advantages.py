"""Which rewards a token's advantage is made of."""

import numpy as np
import pytest

from student_trainer.weighing.advantages import advantages

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

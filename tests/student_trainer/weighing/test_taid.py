"""TAID's controller: golden numbers, laws, and what a checkpoint keeps of it."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from shared.config.losses import TAID
from student_trainer.weighing.taid import TAIDState


def states(losses: list[float], term: TAID, *, steps: int) -> list[TAIDState]:
    """Before the first step and after each."""
    state = TAIDState.start(term)
    found = [replace(state)]
    for step, loss in enumerate(losses):
        state.follow(loss, term, step=step, steps=steps)
        found.append(replace(state))
    return found


def test_momentum_and_share_have_the_published_values():
    found = states([2.0, 1.9, 1.85, 1.9], TAID(t_start=0.2), steps=1000)[1:]
    assert [s.momentum for s in found[1:]] == pytest.approx(
        [5.000e-4, 7.582e-4, 4.803e-4], rel=1e-4
    )
    assert [s.teacher_share for s in found] == pytest.approx([0.2, 0.2008, 0.2016, 0.2024])


def test_without_the_line_a_step_is_half_alpha_of_what_is_left():
    found = states([2.0, 1.9, 1.85, 1.9], TAID(t_start=0.2), steps=10**12)[1:]
    shares = [s.teacher_share for s in found]
    steps = [later - earlier for earlier, later in pairwise(shares)]
    assert steps == pytest.approx([2.0e-4] * 3, rel=2e-3)


@pytest.mark.parametrize(
    "losses",
    [
        [3.0 / (n + 1) for n in range(50)],
        [1.0 + n for n in range(50)],
        [0.0, 1.0, 0.0, 1e-30, 5.0] * 10,
    ],
)
@pytest.mark.parametrize("term", [TAID(), TAID(t_start=0.0, alpha=1.0, beta=0.5, t_end=0.9)])
def test_the_share_never_falls_and_stays_between_its_ends(losses, term):
    shares = [s.teacher_share for s in states(losses, term, steps=50)]
    assert shares == sorted(shares)
    assert shares[0] == term.t_start
    assert shares[-1] <= term.t_end


def test_without_steps_of_its_own_the_share_lies_on_a_line():
    found = states([2.0] * 10, TAID(t_start=0.2, alpha=0.0), steps=10)
    assert [s.teacher_share for s in found[2:]] == pytest.approx(
        [0.2 + 0.8 * n / 10 for n in range(1, 10)]
    )


def test_a_falling_loss_moves_the_share_faster_than_a_rising_one():
    term = TAID(t_start=0.2, alpha=0.1, beta=0.5)
    falling, rising = (
        states([2.0 + sign * n / 10 for n in range(9)], term, steps=10**6) for sign in (-1, 1)
    )
    assert falling[-1].teacher_share > rising[-1].teacher_share + 0.001


def test_a_state_survives_json_bit_for_bit():
    for state in states([2.1, 1.7, 1.3], TAID(), steps=7):
        again = TAIDState.start(None)
        again.restore(json.loads(json.dumps(state.state())))
        assert again == state


def test_a_run_without_taid_has_the_teacher_for_a_target():
    assert TAIDState.start(None).teacher_share == 1

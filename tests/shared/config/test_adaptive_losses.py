"""Losses in which a step decides: what of them is summed over the student's distribution."""

import math

import pytest

from shared.config.adaptive_losses import ATKD, TokenTemperature


@pytest.mark.parametrize(
    ("loss", "weighs"),
    [
        (ATKD(), False),
        (ATKD(direction="reverse"), True),
        (TokenTemperature(), True),
        (TokenTemperature(divergence="forward_kl"), False),
    ],
)
def test_only_reverse_directions_weigh_by_the_student(loss, weighs: bool) -> None:
    assert loss.weighs_by_student == weighs


def test_levels_lie_evenly_in_their_logarithm() -> None:
    found = TokenTemperature(strength=0.6, levels=5).temperatures
    expected = [math.exp(log) for log in (-0.6, -0.3, 0, 0.3, 0.6)]
    assert found == pytest.approx(expected, abs=1e-6)

"""Instance weights: golden numbers, laws, and how they move.

N positions
"""

import json
import math

import numpy as np
import pytest
import torch

from shared.config.weighting import InstanceWeights
from student_trainer.weighing.instance_weights import AnnealedWeights, instance_weight
from student_trainer.weighing.weighting import Seen, StepMeans
from student_trainer.weighing.weightings import follow_step

NEUTRAL = math.exp(-1)


def seen_of(nll_N: list[float]) -> Seen:
    """A teacher's NLL of labels, two to a document."""
    document_N = torch.arange(len(nll_N)) // 2
    logprob_N = -torch.tensor(nll_N, dtype=torch.float64)
    return Seen(logprob_N, lambda: None, None, {}, torch.zeros_like(document_N), document_N, 64)


def weighting_of(*, step: int = 0, mean: float | None = None, **options) -> AnnealedWeights:
    """A weighting before a step of 5, with a running mean."""
    weighting = AnnealedWeights(InstanceWeights.model_validate(options), num_domains=1, steps=5)
    if mean is not None:
        sums = {"teacher_nll": np.array([10 * mean])}
        weighting.follow(StepMeans(sums, np.array([10]), step=step))
    return weighting


def test_golden_numbers():
    nll_N = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    found = instance_weight(nll_N, centre=1.0, steepness=3.0)
    np.testing.assert_allclose(found, [0.800011, 0.367879, 0.011314], atol=5e-7)


@pytest.mark.parametrize("steepness", [0.0, 0.1, 3.0, 50.0])
def test_at_its_centre_a_document_counts_one_over_e(steepness: float):
    found = instance_weight(torch.tensor([2.5]).double(), centre=2.5, steepness=steepness)
    assert found.item() == pytest.approx(NEUTRAL, rel=1e-12)


def test_a_weight_falls_with_the_teachers_loss_and_stays_between_0_and_1():
    nll_N = torch.linspace(0, 40, 400, dtype=torch.float64)
    found = instance_weight(nll_N, centre=1.5, steepness=3.0)
    assert ((found >= 0) & (found <= 1)).all()
    falling = found[found > 0]
    assert len(falling) > 50
    assert (falling[1:] < falling[:-1]).all()
    assert found.isfinite().all()


def test_without_steepness_all_count_one_over_e():
    found = weighting_of(steepness=0.0, mean=1.0).weights(seen_of([0.1, 9.0, 3.0, 3.0]))
    np.testing.assert_allclose(found.taught_N, NEUTRAL, rtol=1e-12)


@pytest.mark.parametrize(
    ("unit", "nll_N"), [("document", [1.0, 1.0, 3.0, 3.0]), ("token", [0.5, 1.5, 2.0, 4.0])]
)
def test_a_document_has_one_weight_and_a_token_its_own(unit: str, nll_N: list[float]):
    weighting = weighting_of(unit=unit, centre=1.2, steepness=2.0)
    found = weighting.weights(seen_of([0.5, 1.5, 2.0, 4.0]))
    expected = np.exp(-np.exp(np.array(nll_N) - 1.2))
    np.testing.assert_allclose(found.taught_N, expected, rtol=1e-12)
    np.testing.assert_allclose(found.text_N, 1 - expected, rtol=1e-12)
    np.testing.assert_allclose(found.reports["teacher_nll"], nll_N, rtol=1e-12)


def test_the_steepness_falls_on_a_line_to_the_last_step():
    options = {"steepness": 4.0, "final_steepness": 1.0, "mean": 1.0}
    found = [weighting_of(step=step, **options).steepness for step in (0, 2, 4)]
    assert found == [4.0, 2.5, 1.0]
    assert weighting_of(steepness=4.0).steepness == 4.0


def test_a_scored_centre_stands_still():
    section = InstanceWeights(centre="median")
    weighting = AnnealedWeights(section, num_domains=1, steps=5, scored_centre=1.5)
    weighting.follow(StepMeans({"teacher_nll": np.array([30.0])}, np.array([10]), step=1))
    assert weighting.centre == 1.5


def test_the_centre_is_a_number_or_the_running_mean_of_the_steps_before():
    assert weighting_of(centre=2.0, mean=7.0).centre == 2.0
    first = weighting_of(decay=0.5)
    assert first.centre is None
    np.testing.assert_allclose(first.weights(seen_of([1.0, 8.0])).taught_N, NEUTRAL)
    weighting = weighting_of(decay=0.5, mean=1.0)
    weighting.follow(StepMeans({"teacher_nll": np.array([30.0])}, np.array([10]), step=2))
    assert weighting.centre == pytest.approx((0.5 * 1 + 3) / 1.5)


def test_a_state_survives_json_bit_for_bit():
    weighting, again = weighting_of(mean=1.7, step=1), weighting_of()
    again.restore(json.loads(json.dumps(weighting.state())))
    seen = seen_of([0.3, 2.0, 1.0, 5.0])
    assert torch.equal(again.weights(seen).taught_N, weighting.weights(seen).taught_N)
    assert again.state() == weighting.state()


def test_the_last_step_has_the_last_steepness():
    weighting, found = weighting_of(steepness=3.0, final_steepness=1.0), []
    sums = {"selected_share": np.array([9.0]), "teacher_nll": np.array([10.0])}
    for step in range(5):
        found.append(weighting.steepness)
        follow_step(weighting, sums, np.array([10]), step=step, policy_F=np.zeros(0))
    assert found == [3.0, 2.5, 2.0, 1.5, 1.0]


def test_a_run_that_goes_on_for_more_steps_has_the_line_of_all_of_them():
    section = InstanceWeights(steepness=4.0, final_steepness=0.0)
    ended = weighting_of(step=5, mean=1.0, steepness=4.0)
    assert ended.steepness == 0.0
    longer = AnnealedWeights(section, num_domains=1, steps=11)
    longer.restore(ended.state())
    assert longer.steepness == 2.0

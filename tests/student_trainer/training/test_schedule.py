"""The learning rate: warm-up, then a shape, as a function of the step alone."""

import pytest

from shared.config.run import Optimiser
from student_trainer.schedule import learning_rate


def rates(**options: object) -> list[float]:
    optimiser = Optimiser.model_validate({"lr": 2.0, **options})
    return [learning_rate(optimiser, step=step, steps=11) for step in range(11)]


def test_warm_up_rises_on_a_line_to_the_full_rate() -> None:
    assert rates(warmup_steps=4, schedule="constant")[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_final_fraction_without_rising(schedule: str) -> None:
    found = rates(schedule=schedule, final_lr_fraction=0.25)
    assert found[0] == 2.0
    assert found[-1] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(schedule="cosine", final_lr_fraction=0.0)[5] == pytest.approx(1.0)


def test_a_warm_up_as_long_as_the_run_never_decays() -> None:
    assert max(rates(warmup_steps=11)) == rates(warmup_steps=11)[-1] == 2.0

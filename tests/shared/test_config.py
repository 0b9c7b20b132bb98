"""The config tree: what it derives, and what it refuses as a whole."""

import pytest
from pydantic import ValidationError

from shared.config import Config

SMALLEST = {
    "name": "x",
    "steps": 10,
    "teachers": {"t": {"model": "a"}},
    "student": {"model": "b"},
    "domains": {"math": {"train": "m"}, "code": {"train": "c"}},
}


def config(**parts: object) -> Config:
    return Config.model_validate(SMALLEST | parts)


def test_accumulation_is_what_is_left_of_a_step_for_one_worker():
    batch = {"rows_per_step": 24, "micro_batch": 3}
    assert config(batch=batch, student={"model": "b", "workers": 2}).accumulation == 4


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValidationError, match=r"batch.rows_per_step is 8, not a multiple"):
        config(batch={"rows_per_step": 8, "micro_batch": 3})


def test_temperatures_begin_with_one_and_hold_each_once():
    losses = [{"kind": "forward_kl", "temperature": t} for t in (2.0, 1.0, 2.0, 4.0)]
    assert config(losses=losses).temperatures == (1.0, 2.0, 4.0)


def test_only_losses_that_learn_from_a_teacher_need_one():
    assert not config(losses=[{"kind": "cross_entropy"}]).needs_teacher
    assert config().needs_teacher


def test_prefetch_never_passes_the_lag():
    for lag in (0, 1, 2, 5):
        mixture = {"policy": "ddk", "interval": 10, "lag_steps": lag}
        assert config(mixture=mixture).prefetch_steps <= lag


def test_an_interval_below_the_lag_is_refused():
    with pytest.raises(ValidationError, match=r"raise the interval or lower the lag"):
        config(mixture={"policy": "ddk", "interval": 2, "lag_steps": 3})


def test_fixed_weights_name_every_domain():
    with pytest.raises(ValidationError, match=r"mixture.weights must name every domain"):
        config(mixture={"policy": "fixed", "weights": {"math": 1.0}})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        config().steps = 3  # type: ignore[misc]

"""Modules of a teacher that learn beside the student, as a config has them."""

import pytest
from pydantic import ValidationError

from shared.config.run import Config


def config(modules: dict | None, teacher: dict | None = None, **options: object) -> Config:
    asked = {"model": "large", **(teacher or {}), "online_modules": modules}
    return Config.model_validate(
        {
            "name": "run",
            "steps": 1000,
            "teachers": {"t": asked},
            "student": {"model": "small"},
            "domains": {"d": {"train": "text"}},
            **options,
        }
    )


def test_a_teacher_has_modules_where_a_loss_asks_it():
    asked = config({"r": 4})
    assert asked.modules is not None
    assert asked.modules.r == 4
    assert asked.modules_lag == 1
    assert config({"lag": 2}).modules_lag == 2
    assert config({}, mixture={"policy": "ddk", "lag_steps": 0}).modules_lag == 0
    assert config(None).modules is None
    assert config({}, losses=[{"kind": "cross_entropy"}]).modules is None


@pytest.mark.parametrize(
    ("modules", "options", "said"),
    [
        ({"r": 0}, {}, "greater than or equal to 1"),
        ({"lr": -1e-4}, {}, "greater than or equal to 0"),
        ({"target_modules": "q_proj"}, {}, "all-linear"),
        ({"target_modules": []}, {}, "at least 1 item"),
        (
            {},
            {"teacher": {"quantisation": "int8"}},
            "online_modules is set, and quantisation is int8",
        ),
        (
            {},
            {"teacher": {"quantisation": "nf4"}},
            "online_modules is set, and quantisation is nf4",
        ),
        (
            {},
            {"teacher": {"tensor_parallel": 2}},
            "online_modules is set, and tensor_parallel is 2",
        ),
        (
            {},
            {"teacher": {"engine": "vllm", "python": "/p"}},
            "online_modules is set, and engine is vllm, which forms no gradient",
        ),
        ({}, {"targets": {"store": "answers"}}, "targets.store is answers, which keeps answers"),
        ({}, {"source": "teacher"}, "which learns from the labels of rows, but source has teacher"),
        (
            {"lag": 1},
            {"mixture": {"policy": "ddk", "lag_steps": 0}},
            r"online_modules.lag is 1, but steps are asked about at most 0 ahead .* to 0",
        ),
    ],
)
def test_modules_that_cannot_learn_are_refused_in_a_sentence(modules, options, said):
    with pytest.raises(ValidationError, match=said):
        config(modules, **options)


def test_modules_are_those_of_the_only_teacher():
    teachers = {"t": {"model": "large", "online_modules": {}}, "u": {"model": "other"}}
    domains = {name: {"train": "text", "teacher": name} for name in teachers}
    with pytest.raises(ValidationError, match="but teachers has 2; keep one teacher"):
        config({}, teachers=teachers, domains=domains)

"""A teacher that is the student some steps ago, as a config has it."""

import pytest
from pydantic import ValidationError

from shared.config.models.following import FollowedStudent
from shared.config.run import Config


def config(followed: dict | None, teacher: dict | None = None, **options: object) -> Config:
    asked = {"model": "small", "follow_student": followed, **(teacher or {})}
    fields = {
        "name": "run",
        "steps": 1000,
        "teachers": {"itself": asked},
        "student": {"model": "small"},
        "domains": {"d": {"train": "text"}},
    }
    return Config.model_validate({**fields, **options})


@pytest.mark.parametrize(
    ("lag", "every", "versions"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5, 6]),
        (1, 1, [0, 0, 1, 2, 3, 4, 5]),
        (2, 1, [0, 0, 0, 1, 2, 3, 4]),
        (0, 3, [0, 0, 0, 3, 3, 3, 6]),
        (1, 3, [0, 0, 0, 0, 3, 3, 3]),
    ],
)
def test_a_step_is_taught_by_the_newest_student_in_turn_that_is_as_old_as_asked(
    lag, every, versions
):
    followed = FollowedStudent(lag=lag, every=every)
    assert [followed.version(step) for step in range(7)] == versions


def test_a_teacher_follows_where_a_loss_asks_it():
    assert config({"lag": 4}).followed == FollowedStudent(lag=4)
    assert config(None).followed is None
    assert config({}, losses=[{"kind": "cross_entropy"}]).followed is None
    adapted = {"model": "small", "train": {"kind": "qlora"}, "dtype": "bfloat16"}
    assert config({}, {"quantisation": "nf4", "dtype": "bfloat16"}, student=adapted).followed


LORA = {"model": "small", "train": {"kind": "lora"}}


@pytest.mark.parametrize(
    ("followed", "teacher", "options", "said"),
    [
        ({"lag": -1}, {}, {}, "greater than or equal to 0"),
        ({"every": 0}, {}, {}, "greater than or equal to 1"),
        ({}, {"model": "large"}, {}, "itself.model is large, and the student has small"),
        ({}, {"dtype": "bfloat16"}, {}, "dtype is bfloat16, and the student has float32"),
        ({}, {"quantisation": "nf4"}, {"student": LORA}, "nf4, and the student has none"),
        ({}, {"adapter": "a"}, {}, "follow_student is set, but adapter is a, whose weights"),
        ({}, {"tensor_parallel": 2}, {}, "but tensor_parallel is 2, whose weights"),
        ({}, {"engine": "vllm", "python": "/p"}, {}, "but engine is vllm, whose weights"),
        ({}, {"online_modules": {}}, {}, "but online_modules are set too"),
        ({}, {}, {"targets": {"store": "answers"}}, "targets.store is answers, which keeps"),
        ({}, {}, {"targets": {"exact": "last_hidden"}}, "exact is last_hidden, .* shipped once"),
        ({}, {}, {"source": "teacher"}, "but source has a teacher that writes"),
        (
            {"lag": 1},
            {},
            {"source": {"student": 1, "lag": 2}, "mixture": {"policy": "ddk", "lag_steps": 2}},
            "lag is 1, but what the student writes is asked about 2 ahead",
        ),
    ],
)
def test_what_no_student_could_be_is_refused_in_a_sentence(followed, teacher, options, said):
    with pytest.raises(ValidationError, match=said):
        config(followed, teacher, **options)


def test_the_head_of_a_student_with_adapters_may_be_shipped():
    assert config({}, student=LORA, targets={"exact": "last_hidden"}).followed is not None


def test_the_student_is_the_only_teacher_where_it_is_one():
    teachers = {"t": {"model": "small", "follow_student": {}}, "u": {"model": "other"}}
    domains = {name: {"train": "text", "teacher": name} for name in teachers}
    with pytest.raises(ValidationError, match="but teachers has 2; keep one teacher"):
        config({}, teachers=teachers, domains=domains)

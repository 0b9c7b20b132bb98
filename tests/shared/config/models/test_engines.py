"""What a teacher in vLLM is not asked for is refused with the config."""

import re

import pytest
from pydantic import ValidationError

from shared.config.models.teachers import Teacher
from shared.config.run import Config

PYTHON = "~/vllm/bin/python"


VLLM = {"big": {"model": "m", "engine": "vllm", "python": PYTHON}}


def config(teachers: dict = VLLM, **sections) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "steps": 1000,
            "teachers": teachers,
            "student": {"model": "s"},
            "domains": {"text": {"train": "text.jsonl"}},
            **sections,
        }
    )


def test_auto_asks_it_for_the_likeliest_ids():
    assert config().selector_for(1000) == "top_k"
    own = config().model_copy(update={"teachers": {"big": Teacher(model="m")}})
    assert own.selector_for(1000) == "threshold"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"losses": [{"kind": "forward_kl", "temperature": 2.0}]}, "losses have temperature 2;"),
        ({"losses": [{"kind": "forward_kl", "temperature": 0.5}]}, "losses have temperature 0.5;"),
        ({"targets": {"selector": "threshold"}}, "targets.selector is threshold, which draws ids;"),
        ({"targets": {"selector": "sampled"}}, "targets.selector is sampled, which draws ids"),
        ({"targets": {"exact": "last_hidden"}}, "targets.exact is last_hidden"),
        (
            {"targets": {"student_ids": 1}, "losses": [{"kind": "reverse_kl"}]},
            "targets.student_ids is 1",
        ),
        (
            {
                "losses": [
                    {"kind": "forward_kl"},
                    {"kind": "hidden_states", "layers": {2: 1}},
                ]
            },
            "losses has a hidden_states",
        ),
        ({"progressive": {"difficulty": "teacher_entropy"}}, "progressive.difficulty is teacher_"),
    ],
)
def test_what_it_cannot_answer_is_refused_in_a_sentence(sections, said):
    with pytest.raises(ValidationError) as refused:
        config(**sections)
    (error,) = refused.value.errors()
    assert "teachers.big.engine is vllm, which gives" in error["msg"]
    assert f"but {said}" in error["msg"]
    assert error["msg"].endswith("or set teachers.big.engine=transformers")
    config({"big": {"model": "m"}}, **sections)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_temperature_at_which_it_does_not_write_is_refused_with_the_config(temperature):
    source = {"teacher": 0.5, "dataset": 0.5, "temperature": temperature}
    with pytest.raises(ValidationError, match=f"but source.temperature is {temperature}; change"):
        config(source=source)
    config({"big": {"model": "m"}}, source=source)
    for drawn in (0, 0.01, 2):
        config(source=source | {"temperature": drawn})


def test_a_unit_is_not_waited_for_longer_than_its_process_is():
    service = {"unit_deadline_s": 7200.0}
    with pytest.raises(ValidationError, match=r"unit_deadline_s is 7200, but .* set at most 3600"):
        config(service=service)
    config(service={"unit_deadline_s": 3600.0})
    config({"big": {"model": "m"}}, service=service)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "vllm"}, "needs an environment of its own; set python=PATH"),
        ({"python": PYTHON}, f"python is {PYTHON}, but engine is transformers"),
        ({"engine": "vllm", "python": "venv/bin/python"}, "name it from / or ~"),
        ({"engine": "vllm", "python": PYTHON, "adapter": "a"}, "engine is vllm and adapter a"),
        ({"engine": "vllm", "python": PYTHON, "quantisation": "nf4"}, "and quantisation nf4"),
        ({"engine": "vllm", "python": PYTHON, "attention": "sdpa"}, "and attention sdpa"),
        ({"engine": "vllm", "python": PYTHON, "tensor_parallel": 2}, "and tensor_parallel 2"),
    ],
)
def test_a_teachers_own_options_fit_its_engine(settings, said):
    with pytest.raises(ValidationError, match=re.escape(said)):
        Teacher(model="m", **settings)
    assert Teacher(model="m", engine="vllm", python="~/vllm/bin/python").apart

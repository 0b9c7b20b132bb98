"""Copies of the student that write, as a config has them."""

import pytest
from pydantic import ValidationError

from shared.config.models.rollouts import RolloutService
from shared.config.models.student import Student
from shared.config.models.teachers import Autoscaling
from shared.config.run import Config

STUDENT = Student(
    model="small",
    gpus=1,
    cpus=3,
    dtype="bfloat16",
    revision="r",
    attention="eager",
    trust_remote_code=True,
)

PYTHON = "~/vllm/bin/python"
VLLM = {"replicas": 1, "engine": "vllm", "python": PYTHON}


def config(**options: object) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "steps": 1,
            "teachers": {"t": {"model": "large"}},
            "student": {"model": "small"},
            "domains": {"d": {"train": "text"}},
            **options,
        }
    )


def test_copies_are_served_as_asked():
    """What is not said is as a worker has it."""
    served = RolloutService(replicas=2).served(STUDENT)
    assert (served.model, served.revision, served.dtype) == ("small", "r", "bfloat16")
    assert (served.attention, served.trust_remote_code) == ("eager", True)
    assert (served.fewest, served.gpus, served.cpus) == (2, 1, 3)
    bounds = {"min": 2, "max": 5, "wait": 0.1}
    asked = config(source="student", rollouts={"replicas": bounds, "gpus": 0, "cpus": 0.5})
    served = asked.rollouts.served(STUDENT)
    assert served.replicas == Autoscaling(min=2, max=5, wait=0.1)
    assert (served.fewest, served.most, served.gpus, served.cpus) == (2, 5, 0, 0.5)
    assert asked.rollouts.most == 5
    assert asked.rollouts.serves
    assert not config(source="student").rollouts.serves


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollouts": {"replicas": 2}}, "rollouts.replicas is 2, but source has student 0"),
        ({"rollouts": {"replicas": 2}, "source": "teacher"}, "but source has student 0"),
        ({"rollouts": {"replicas": {"max": 3}}}, "rollouts.replicas is 3, but source has student"),
        ({"rollouts": {"replicas": -1}, "source": "student"}, "greater than or equal to 0"),
        ({"rollouts": {"gpus": -1}, "source": "student"}, "greater than or equal to 0"),
        (
            {"rollouts": {"gpus": 0}, "source": "student"},
            "rollouts.gpus is 0, but rollouts",
        ),
        ({"rollouts": {"cpus": 0.5}}, "rollouts.cpus is 0.5, but rollouts.replicas is 0"),
        ({"rollouts": {"replicas": {"min": 3, "max": 2}}, "source": "student"}, "raise max"),
        ({"rollouts": {"python": PYTHON}}, f"python is {PYTHON}, but engine is transformers"),
        ({"rollouts": {"replicas": 1, "engine": "vllm"}}, "needs an environment of its own"),
        ({"rollouts": VLLM | {"python": "venv/python"}}, "name it from / or ~"),
        ({"rollouts": VLLM | {"replicas": 0}}, "rollouts.engine is vllm, but rollouts.replicas is"),
    ],
)
def test_copies_that_cannot_be_are_refused(options: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        config(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": {"student": 1.0, "temperature": 0.005}}, "source.temperature is 0.005"),
        ({"source": {"student": 1.0, "temperature": 2.5}}, "source.temperature is 2.5"),
        ({"student": {"dtype": "bfloat16"}}, "student.dtype is bfloat16"),
        ({"student": {"attention": "eager"}}, "student.attention is eager"),
        ({"student": {"upcycle": {}}}, "student.upcycle makes another of it"),
        ({"student": {"train": {"kind": "qlora"}}}, "student.train.kind is qlora"),
        ({"student": {"train": {"kind": "lora", "r": 513}}}, "student.train.r is 513"),
        ({"service": {"unit_deadline_s": 7200.0}}, "service.unit_deadline_s is 7200"),
    ],
)
def test_a_student_that_vllm_cannot_write_as_is_refused(options: dict, said: str):
    student = {"model": "small", **options.get("student", {})}
    asked = {"source": "student", **options, "student": student}
    with pytest.raises(ValidationError) as refused:
        config(**asked, rollouts=VLLM)
    (error,) = refused.value.errors()
    assert "rollouts.engine is vllm, wh" in error["msg"]
    assert error["msg"].endswith(f"{said}; change that, or set rollouts.engine=transformers")
    config(**asked, rollouts={"replicas": 1})


def test_a_copy_in_vllm_is_served_in_a_process_apart():
    asked = config(source="student", rollouts=VLLM)
    served = asked.rollouts.served(asked.student)
    assert (served.engine, served.python, served.apart) == ("vllm", PYTHON, True)

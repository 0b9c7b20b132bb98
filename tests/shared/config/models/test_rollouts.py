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
    ],
)
def test_copies_that_cannot_be_are_refused(options: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        config(**options)

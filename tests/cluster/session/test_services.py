"""Which service is whose teacher's, from what the command line says."""

import pytest

from cluster.session.services import named_services, services_of
from shared.config.run import Config
from shared.errors import ConfigError


def config(*teachers: str) -> Config:
    described = {
        "name": "x",
        "steps": 1,
        "teachers": {name: {"model": name} for name in teachers},
        "student": {"model": "s"},
        "domains": {f"of-{name}": {"train": "t", "teacher": name} for name in teachers},
    }
    return Config.model_validate(described)


def test_one_teacher_takes_any_name():
    assert services_of(config("a"), None) is None
    assert services_of(config("a"), "up") == {"a": "up"}
    assert services_of(config("a"), "a=up") == {"a": "up"}


def test_several_are_named_one_by_one_in_any_order():
    assert services_of(config("a", "b"), "b=x,a=y") == {"a": "y", "b": "x"}
    assert named_services(config("a", "b")) == {"a": "a", "b": "b"}


@pytest.mark.parametrize("given", ["up", "a=x", "a=x,c=y", "a=x,b=", "a=x,b=y,c=z"])
def test_a_name_for_all_or_not_for_each_is_refused(given: str):
    with pytest.raises(ConfigError, match=r"say --service a=SERVICE,b=SERVICE"):
        services_of(config("a", "b"), given)

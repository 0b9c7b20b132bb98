"""No option of the config without a test that sets it: see `knobs.py`."""

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from shared.config.messages import option_paths
from shared.config.run import Config
from tests.surfaces.knobs import KNOBS
from tests.surfaces.reading import TAGS, exists, is_drill, is_set_by
from tests.telling import telling


def defaults() -> dict[str, list[Any]]:
    """The defaults of every option; those that a config must name have none."""
    found: dict[str, list[Any]] = {option: [] for option in option_paths()}
    for option, default in _defaults(Config, ()):
        found[option].append(default)
    return found


def _defaults(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            option = ".".join((*path, name))
            if field.is_required():
                default = None
            elif (default := field.get_default(call_default_factory=True)) and name in TAGS:
                pass  # which of several kinds is the default, the option above says
            elif option in option_paths():
                yield option, default
            if isinstance(default, BaseModel):
                told = TAGS & set(type(default).model_fields)
                yield from ((f"{option}.{tag}", getattr(default, tag)) for tag in told)
            yield from _defaults(field.annotation, (*path, name))
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _defaults(argument, path)
    elif origin in (list, dict):
        yield from _defaults(arguments[-1], (*path, "N" if origin is list else "NAME"))
    elif arguments and hasattr(annotation, "__metadata__"):
        yield from _defaults(arguments[0], path)


DEFAULTS = defaults()


def test_every_option_has_a_test():
    assert list(KNOBS) == list(option_paths())


@pytest.mark.parametrize("option", KNOBS)
def test_its_test_gives_an_option_another_value_than_its_default(option):
    test = KNOBS[option]
    assert exists(test), f"there is no {test}"
    assert not is_drill(test), f"{test} is a drill"
    assert is_set_by(test, option, defaults=DEFAULTS[option]), f"{test} does not set {option}"


def test_a_test_that_leaves_an_option_alone_is_told_from_one_that_sets_it():
    loop = KNOBS["optimiser.lr"]
    assert is_set_by(loop, "optimiser.final_lr_fraction", defaults=[0.1])
    assert not is_set_by(loop, "optimiser.final_lr_fraction", defaults=[0.3])
    assert not is_set_by(loop, "baseline", defaults=[False])
    assert not exists(loop + "s")


@pytest.mark.parametrize(
    ("option", "other"),
    [
        ("student.dtype", "teachers.NAME.dtype"),
        ("student.cpus", "teachers.NAME.cpus"),
        ("student.gpus", "teachers.NAME.gpus"),
        ("student.train.alpha", "mixture.alpha"),
        ("student.upcycle.every", "weighting.every"),
        ("mixture.start", "weighting.start"),
        ("rollouts.python", "teachers.NAME.python"),
    ],
)
def test_an_option_is_told_from_others_of_its_name(option, other):
    assert is_set_by(KNOBS[other], other, defaults=DEFAULTS[other])
    assert not is_set_by(KNOBS[other], option, defaults=DEFAULTS[option])


CASES = {"shown": {"optimiser": {"lr": 0.3}}, "left out": {"optimiser": {"eps": 0.3}}}


@pytest.mark.parametrize("name", telling(CASES, "shown"))
@pytest.mark.parametrize(
    "decay", telling([{"weight_decay": 0.3}, {"weight_decay": 0.0}], {"weight_decay": 0.0})
)
@pytest.mark.parametrize(
    "clip", [{"clip_norm": 0.3}, pytest.param({"warmup_steps": 7}, marks=pytest.mark.drill)]
)
def test_cases_that_are_drills_set_nothing(name, decay, clip):
    """Of the options that this test's own cases have."""
    test = "surfaces/test_knobs.py::test_cases_that_are_drills_set_nothing"
    options = ("lr", "eps", "weight_decay", "clip_norm", "warmup_steps")
    found = {leaf: is_set_by(test, f"optimiser.{leaf}", defaults=[0.0]) for leaf in options}
    assert [leaf for leaf, is_set in found.items() if is_set] == ["lr", "clip_norm"]

"""Options that need another one to have an effect are refused without it, and with it are not."""

from pathlib import Path
from typing import Any

import pytest

from shared.config.file import load_config
from shared.config.idle import refuse_idle
from shared.config.run import Config
from shared.errors import ConfigError

BASE = {
    "name": "a",
    "steps": 4,
    "teachers": {"t": {"model": "t"}},
    "student": {"model": "s"},
    "domains": {"d": {"train": "d.jsonl"}},
}
TEACHER = {"source": {"teacher": 1.0}}
WRITING = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "min_new_tokens": 2}
STORED, DRAWN = {"targets": {"store": "x"}}, {"targets": {"selector": "threshold"}}
CASES = [
    *(("source", {option: value}, TEACHER) for option, value in WRITING.items()),
    *(("source", {option: 7}, TEACHER) for option in ("prompt_tokens", "batch_rows")),
    ("evaluation", {"store_gb": 5.0}, STORED),
    ("targets", {"store_ids": "plain"}, STORED),
    *(("targets", {"selector": "top_k", option: 7}, DRAWN) for option in ("draws", "seed")),
    (
        "optimiser",
        {"schedule": "constant", "final_lr_fraction": 0.5},
        {"optimiser": {"schedule": "linear"}},
    ),
]


def config(section: str, options: dict[str, Any], **more: Any) -> Config:
    return Config.model_validate(BASE | more | {section: options | more.get(section, {})})


@pytest.mark.parametrize(("section", "options", "needed"), CASES)
def test_an_option_without_effect_is_refused(section, options, needed) -> None:
    (option, value) = list(options.items())[-1]
    said = f"{section}.{option} is {str(value).lower()}, but .*; .*, or leave it out"
    with pytest.raises(ConfigError, match=said):
        refuse_idle(config(section, options))
    refuse_idle(config(section, options, **needed))


def test_options_of_hidden_states_may_stay_where_they_are_not_asked_for() -> None:
    """Another loss or projection on a recipe's command line is how these are compared."""
    for hidden in ({"width": 7}, {"projection": "random", "calibration_rows": 7}):
        refuse_idle(config("targets", {"hidden": hidden}))


def test_what_a_stage_may_need_is_not_refused() -> None:
    stages = {"one": {}, "two": {"source.teacher": 1.0, "source.dataset": 0.0}}
    refuse_idle(config("source", {"temperature": 0.7}, stages=stages))


def test_defaults_and_every_recipe_have_none() -> None:
    refuse_idle(Config.model_validate(BASE))
    for recipe in sorted((Path(__file__).parents[3] / "cluster" / "recipes").glob("*.yaml")):
        refuse_idle(load_config(recipe))

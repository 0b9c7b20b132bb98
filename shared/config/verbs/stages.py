"""Stages of a run: what each changes, named as an override names it."""

import re
from collections.abc import Mapping
from typing import Any

Stages = dict[str, dict[str, Any]]  # options by their dotted names, by stage

LONGEST_NAME = 200  # of a run; that of a stage's is made of both names
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
# What is the run's. A student is what the stage before exported, of the same kind.
SHARED = (
    *("name", "paths", "task", "teachers", "stages", "active", "prompt_search"),
    *("student.model", "student.revision", "student.trust_remote_code"),
)


def check_stages(stages: Mapping[str, Mapping[str, Any]], *, name: str, rounds: bool) -> None:
    """Raise ValueError where a run cannot go in the stages asked for; `rounds` says that it is of
    `tutelage active`."""
    if stages and rounds:
        raise ValueError("stages and active are both set; leave one out")
    for stage, options in stages.items():
        if not NAME.fullmatch(stage):
            raise ValueError(
                f"stages names {stage!r}; folders are named after stages, so take small letters, "
                "digits, - and _"
            )
        if len(name) + len(stage) >= LONGEST_NAME:
            raise ValueError(
                f"name and stages.{stage} have {len(name) + len(stage)} characters, and a run is "
                f"named after both; take {LONGEST_NAME - 1} at most"
            )
        for option in options:
            if option == "student":
                raise ValueError(
                    f"stages.{stage} sets student as a whole, whose model is what the stage before "
                    "it leaves; name single options, as student.upcycle"
                )
            if any(option == one or option.startswith(f"{one}.") for one in SHARED):
                raise ValueError(
                    f"stages.{stage} sets {option}, which all stages share; set it outside stages"
                )

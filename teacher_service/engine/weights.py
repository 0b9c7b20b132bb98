"""Load weights: those of a file in the place of the ones that a model has."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from shared.errors import ConfigError
from shared.loading import first_line


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

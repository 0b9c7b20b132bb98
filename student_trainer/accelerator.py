"""Which device this process trains on, and a DeepSpeed that is set up for it on import."""

import logging
import os
import sys
import warnings
from types import ModuleType

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed

if not torch.cuda.is_available():
    # The op would be compiled on first use, needs a compiler, and is no faster than gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed compares the optimizer's class with Muon's, whose import compiles kernels for a second.
_MUON = ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
_MUON.MuonWithAuxAdam = type("MuonWithAuxAdam", (torch.optim.Optimizer,), {})  # type: ignore[attr-defined]
sys.modules.setdefault(_MUON.__name__, _MUON)

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")

__all__ = ["deepspeed", "join", "this_device"]


def this_device() -> torch.device:
    """The GPU of this local rank, or the CPU where none is visible."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join(device: torch.device) -> None:
    """Join the process group that the environment describes, or use the one that exists."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)

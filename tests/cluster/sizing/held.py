"""What a real DeepSpeed engine holds after a step's last backward pass, by ZeRO stage and dtype:
`python -m tests.cluster.sizing.held "STAGE DTYPE" ...` in every rank prints bytes by name as JSON
on rank 0."""

import gc
import json
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shared.config.run import Config
from student_trainer.accelerator import join, this_device
from student_trainer.engine import backward, open_engine, take_step
from tests.cluster.sizing.small import SMALL

STAGES = (0, 1, 2, 3)
DTYPES = ("float32", "bfloat16")
BUCKET_BYTES = 10**9  # of what gradients are reduced in, a part of its own


class Loss(nn.Module):
    """A model whose loss is any."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=ids_BT, use_cache=False).logits.float().square().mean()


def config_of(zero: int, dtype: str, *, workers: int) -> Config:
    """A config that says how the student trains."""
    return Config.model_validate(
        {
            "name": "held",
            "steps": 1,
            "teachers": {"t": {"model": "m"}},
            "student": {"model": "m", "zero": zero, "dtype": dtype, "workers": workers},
            "domains": {"d": {"train": "x"}},
            "batch": {"rows_per_step": 4 * workers, "micro_batch": 2},
        }
    )


def held(zero: int, dtype: str) -> dict[str, int]:
    """Bytes of weights, of optimiser states and of everything that lasts, of this rank."""
    gc.collect()
    before = set(_storages(gc.get_objects()))
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(getattr(torch, dtype))
    config = config_of(zero, dtype, workers=dist.get_world_size())
    engine = open_engine(Loss(model), config)
    for last in (False, True):
        backward(engine, engine(torch.randint(0, 512, (2, 16))), last=last)
    take_step(engine, config, lr=1e-3)
    for last in (False, True):
        backward(engine, engine(torch.randint(0, 512, (2, 16))), last=last)
    gc.collect()
    found = _storages(gc.get_objects())
    parameters = [*engine.module.parameters()]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [t for state in inner.state.values() for t in state.values() if t.numel() > 1]
    return {
        "weights": sum(_storages(getattr(p, "ds_tensor", p) for p in parameters).values()),
        "moments": sum(_storages(states).values()),
        "all": sum(found[place] for place in found.keys() - before if found[place] < BUCKET_BYTES),
    }


def _storages(found: Iterable[object]) -> dict[int, int]:
    tensors = [t for t in found if type(t) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


if __name__ == "__main__":
    join(this_device())
    asked = {name: name.split() for name in sys.argv[1:]}
    found = {name: held(int(zero), dtype) for name, (zero, dtype) in asked.items()}
    if dist.get_rank() == 0:
        print(json.dumps(found))

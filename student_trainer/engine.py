"""DeepSpeed behind a few functions: open, backward, step, gather.

The loss of a micro-batch is a sum over its positions divided by the step's token count over all
ranks. DeepSpeed is not told of accumulation, by which it would divide, and its mean over ranks is
undone by the factor `world size` inside the loss.
"""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.config.run import Config, Optimiser
from shared.errors import ConfigError
from student_trainer.accelerator import deepspeed

SMALLEST_SHARDED = 10_000  # elements; smaller tensors stay whole under ZeRO-3


def open_engine(
    objective: nn.Module, config: Config, sides: Mapping[str, str] | None = None
) -> Any:
    """A DeepSpeed engine around the objective, with a torch AdamW over what trains; `sides` are as
    of `parameter_groups`."""
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.AdamW(
            parameter_groups(objective, config.optimiser, sides),
            lr=config.optimiser.lr,
            betas=config.optimiser.betas,
            eps=config.optimiser.eps,
        ),
        config=deepspeed_config(config),
    )
    return engine


def deepspeed_config(config: Config) -> dict:
    """DeepSpeed's own configuration of a run."""
    optimiser, student = config.optimiser, config.student
    zero = {
        "stage": student.zero,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": SMALLEST_SHARDED,
    }
    described = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        # `backward` marks the end of a step itself: with a count here DeepSpeed would divide by it.
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
    }
    if not clips_here(config) and optimiser.clip_norm is not None:
        described["gradient_clipping"] = optimiser.clip_norm
    if student.dtype == "bfloat16":
        described["bf16"] = {"enabled": True}
        if student.zero > 0:  # DeepSpeed's optimiser for plain bf16 sums micro-batches in bf16
            described["data_types"] = {"grad_accum_dtype": "fp32"}
    return described


def parameter_groups(
    objective: nn.Module, optimiser: Optimiser, sides: Mapping[str, str] | None = None
) -> list[dict]:
    """Matrices decay; biases and norms do not. Frozen weights are in no group. Weights of different
    `sides`, by name, are in different groups, which say by `side` which they are of, and lie one
    after the other in the order of `in_groups`."""
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if len([*groupby(sides.values())] if sides else []) > len(set((sides or {}).values())):
        raise ConfigError(
            "optimiser.balance is set, but the student's weights that see and those that do not "
            "lie among each other; leave it out, or choose another student"
        )
    decays, sides = (optimiser.weight_decay, 0.0), sides or {}
    groups = [
        {
            "params": [trained[name] for name in names if sides.get(name) == side],
            "weight_decay": decay,
            "side": side,
        }
        for names, decay in zip(in_groups(trained), decays, strict=True)
        for side in dict.fromkeys(sides.get(name) for name in trained)
    ]
    return [group for group in groups if group["params"]]


def in_groups(trained: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the matrices and of the vectors among trained weights, sharded or not."""
    dims = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
    matrices = [name for name, dim in dims.items() if dim >= 2]
    return matrices, [name for name, dim in dims.items() if dim < 2]


def clips_here(config: Config) -> bool:
    """DeepSpeed reports no gradient norm for plain fp32 data parallelism, so we clip there."""
    return config.student.zero == 0 and config.student.dtype == "float32"


def backward(engine: Any, loss: torch.Tensor, *, last: bool) -> None:
    """Add the gradient of a micro-batch; `last` marks the final one of the step."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def take_step(
    engine: Any, config: Config, *, lr: float, factors: Mapping[str, float] | None = None
) -> float:
    """Clip and update with learning rate `lr`, times that of `factors` of a group's side; call
    after the step's last backward.

    Returns the norm of the gradient over all ranks, before clipping.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (factors or {}).get(group.get("side"), 1.0)
    norm = None
    if clips_here(config):
        norm = nn.utils.clip_grad_norm_(
            [p for p in engine.module.parameters() if p.grad is not None],
            config.optimiser.clip_norm or math.inf,
        )
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def gather_weights(module: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Whole weights of `module` on the CPU of rank 0, frozen ones too unless `trained_only`.

    Collective under every ZeRO stage; other ranks get an empty dict.
    """
    gathered = {}
    for name, parameter in module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                gathered[name] = parameter.detach().to("cpu", copy=True)
    return gathered if dist.get_rank() == 0 else {}

"""Shards of any number of ranks and any ZeRO stage, read into an engine of other ones.

DeepSpeed loads shards under the ranks and the stage that wrote them; its universal checkpoints know
no stage 0 and no change of stage. What training goes on from is the same under all of them: of each
trained weight its value and AdamW's two moments in float32. Here they are put together weight by
weight, and each rank takes its part.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from student_trainer.accelerator import deepspeed
from student_trainer.engine import in_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
Whole = dict[str, Tensor]  # of one weight: "weight" and `MOMENTS`, float32, flat

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def load_resharded(engine: Any, shards: Path, *, zero: int) -> None:
    """Restore optimiser, trained weights and buffers of every rank from the folder of shards that
    ranks under stage `zero` wrote; all ranks together."""
    model = next(iter(sorted(shards.glob("*model_states.pt"))))
    described = _loaded(model)
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    optimisers = [_loaded(path)["optimizer_state_dict"] for path in _by_rank(shards)]
    if zero == 0:
        names = [name for group in in_groups(trained) for name in group]
        found, updates = _whole_states(described, names), _updates(described["optimizer"])
    elif zero == 3:
        found = _joined(optimisers, described["param_shapes"])
        updates = _updates(optimisers[0])
    else:
        found, updates = _merged(optimisers, list(trained)), _updates(optimisers[0])
    take = _taker(engine, updates=updates)
    for name, whole in found:
        take(trained.pop(name), whole)
    assert not trained, f"no shard holds {', '.join(trained)}"
    for name, buffer in engine.module.named_buffers():
        if name in described["buffer_names"]:
            buffer.copy_(described["module"][name])


def _by_rank(shards: Path) -> list[Path]:
    found = {int(m[1]): path for path in shards.iterdir() if (m := _RANK.search(path.name))}
    return [found[rank] for rank in sorted(found)]


def _loaded(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's; what of it nobody looks at stays on disk."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _adamw(optimiser: Mapping[str, Any]) -> dict[str, Any]:
    """State of torch's optimiser in what DeepSpeed keeps of its own around it."""
    for name in ("base_optimizer_state", "optimizer_state_dict"):
        if name in optimiser:
            return optimiser[name]
    return dict(optimiser)


def _updates(optimiser: Mapping[str, Any]) -> float:
    """Updates done, as AdamW counts them."""
    return max(float(state["step"]) for state in _adamw(optimiser)["state"].values())


# From shards to whole weights, one after the other.


def _whole_states(
    described: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, Whole]]:
    """Of stage 0, whose rank 0 holds everything; `names` are in the optimiser's order."""
    optimiser = described["optimizer"]
    states = _adamw(optimiser)["state"]
    copies = [copy for group in optimiser.get("fp32_groups", ()) for copy in group]
    for place, name in enumerate(names):
        weight = (copies[place] if copies else described["module"][name]).detach().flatten()
        state = states.get(place)  # a weight that no loss has reached has none
        moments = {n: state[n].flatten() if state else torch.zeros_like(weight) for n in MOMENTS}
        yield name, {"weight": weight, **moments}


def _merged(
    optimisers: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[tuple[str, Whole]]:
    """Of stages 1 and 2, where a group of weights lies in one vector that is cut among ranks; each
    rank's shard says which part of which weight is where."""
    for name in names:
        pieces: list[Whole] = []
        for optimiser in optimisers:
            states = _adamw(optimiser)["state"]
            for group, places in enumerate(optimiser["param_slice_mappings"]):
                if name in places:
                    part = slice(places[name].start, places[name].start + places[name].numel)
                    weight = optimiser["single_partition_of_fp32_groups"][group]
                    moments = {moment: states[group][moment] for moment in MOMENTS}
                    whole = {"weight": weight, **moments}
                    pieces.append({key: vector.detach()[part] for key, vector in whole.items()})
        yield name, {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def _joined(
    optimisers: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, torch.Size]]
) -> Iterator[tuple[str, Whole]]:
    """Of stage 3, where each weight is cut among ranks, its last part filled up; `shapes` are those
    of the weights in every vector, in order."""
    for group, in_vector in enumerate(shapes):
        start = 0
        for name, shape in in_vector.items():
            part = slice(start, start := start + -(-shape.numel() // len(optimisers)))
            pieces: dict[str, list[Tensor]] = {key: [] for key in ("weight", *MOMENTS)}
            for optimiser in optimisers:
                state = _adamw(optimiser)["state"][group]
                pieces["weight"].append(optimiser["fp32_flat_groups"][group].detach()[part])
                for moment in MOMENTS:
                    pieces[moment].append(state[moment][part])
            yield name, {key: torch.cat(p)[: shape.numel()] for key, p in pieces.items()}


# From whole weights into an engine.


def _taker(engine: Any, *, updates: float) -> Any:
    """What writes a whole weight into this rank's part of the engine."""
    optimiser = engine.optimizer
    adamw = getattr(optimiser, "optimizer", optimiser)
    sharded = getattr(optimiser, "fp32_partitioned_groups_flat", None)
    vectors = sharded or [p for group in adamw.param_groups for p in group["params"]]
    for vector in vectors:
        moments = {moment: torch.zeros_like(vector.data) for moment in MOMENTS}
        adamw.state[vector] = {"step": torch.tensor(updates), **moments}
    if sharded is not None:
        return _take_sharded
    if hasattr(optimiser, "_lazy_init_hp_params_optimizer_state"):
        optimiser._lazy_init_hp_params_optimizer_state()
        return _take_cut
    return _Plain(optimiser, adamw).take


class _Plain:
    """Stage 0, with or without copies in float32 beside the weights."""

    def __init__(self, optimiser: Any, adamw: torch.optim.Optimizer) -> None:
        self._state = adamw.state
        sides = (getattr(optimiser, name, ()) for name in ("fp16_groups", "fp32_groups"))
        self._copies = {
            id(weight): copy
            for weights, copies in zip(*sides, strict=True)
            for weight, copy in zip(weights, copies, strict=True)
        }

    def take(self, parameter: nn.Parameter, whole: Whole) -> None:
        """Write all of it."""
        stepped = self._copies.get(id(parameter), parameter)
        for target in (parameter, stepped):
            target.data.copy_(whole["weight"].view(parameter.shape))
        for moment in MOMENTS:
            self._state[stepped][moment].copy_(whole[moment].view(parameter.shape))


def _take_cut(parameter: nn.Parameter, whole: Whole) -> None:
    """Stages 1 and 2: every rank holds the weight, and steps a part of it or none."""
    parameter.data.copy_(whole["weight"].view(parameter.shape))
    safe_set_full_fp32_param(parameter, whole["weight"])
    for moment in MOMENTS:
        safe_set_full_optimizer_state(parameter, whole[moment], moment)


def _take_sharded(parameter: Any, whole: Whole) -> None:
    """Stage 3: every rank holds and steps a part."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(whole["weight"].view(parameter.shape))
    size = parameter.ds_tensor.numel()
    first = size * dist.get_rank()

    def own(vector: Tensor) -> Tensor:
        piece = vector[first : first + size]
        return nn.functional.pad(piece, (0, size - len(piece)))

    safe_set_local_fp32_param(parameter, own(whole["weight"]))
    for moment in MOMENTS:
        safe_set_local_optimizer_state(parameter, own(whole[moment]), moment)

"""Proof that adapters leave the base alone: a hash of every frozen weight, taken twice.

Each rank hashes what it holds, which under ZeRO-3 is its shard, so nothing is gathered.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from shared.errors import FrozenWeightsError
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks

# In the names of weights that peft adds: of adapters, and of what trains whole beside them.
ADDED = ("lora_", "modules_to_save")


@dataclass(frozen=True, slots=True)
class FrozenWeights:
    """The base of an adapted student as it was when training began."""

    digest: str  # over all ranks; depends on their number and the ZeRO stage
    num_frozen: int  # weights of the base
    num_trained: int  # weights of adapters and projections
    hashes: dict[str, str]  # of what this rank holds, by name

    def facts(self) -> dict[str, str | int]:
        """For people and checkpoints."""
        counts = {"num_frozen": self.num_frozen, "num_trained": self.num_trained}
        return {"digest": self.digest, **counts}


def frozen_weights(student: Student, objective: nn.Module, ranks: Ranks) -> FrozenWeights | None:
    """Hash the base once the engine has placed it; None for a student that trains whole."""
    if not student.is_adapted:
        return None
    base, hashes = dict(_base(student)), _hashes(student)
    mine = xxhash.xxh3_128_hexdigest("".join(f"{n} {h} " for n, h in hashes.items()).encode())
    added = {id(p) for p in objective.parameters()} - {id(p) for p in base.values()}
    return FrozenWeights(
        digest=xxhash.xxh3_128_hexdigest(" ".join(ranks.gather(mine)).encode()),
        num_frozen=sum(map(num_weights, base.values())),
        num_trained=sum(num_weights(p) for p in objective.parameters() if id(p) in added),
        hashes=hashes,
    )


def base_digest(student: Student) -> str | None:
    """Hash of the base before an engine places it, which is the same however many ranks there are;
    None for a student that trains whole."""
    if not student.is_adapted:
        return None
    named = "".join(f"{name} {digest} " for name, digest in _hashes(student).items())
    return xxhash.xxh3_128_hexdigest(named.encode())


def refuse_changed(student: Student, frozen: FrozenWeights | None, ranks: Ranks) -> None:
    """Raise FrozenWeightsError on all ranks where a frozen weight is not what it was on any."""
    if frozen is None:
        return
    now = _hashes(student)
    changed = [name for name, before in frozen.hashes.items() if now[name] != before]
    everywhere = sorted({name for names in ranks.gather(changed) for name in names})
    if everywhere:
        raise FrozenWeightsError(
            f"{len(everywhere)} frozen weights of the student changed in training, first "
            f"{everywhere[0]}; adapters on them would not be what was trained, so nothing is "
            "exported; this is a defect of the program, please report it"
        )


def _base(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    """By name and not by `requires_grad`: a weight that was unfrozen by mistake counts too."""
    named = student.saved.named_parameters()
    return (
        (name, parameter) for name, parameter in named if not any(part in name for part in ADDED)
    )


def _hashes(student: Student) -> dict[str, str]:
    return {name: _hash(parameter) for name, parameter in _base(student)}


@torch.no_grad()
def _hash(parameter: nn.Parameter) -> str:
    state = xxhash.xxh3_128()
    for tensor in _held(parameter):
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(plain.numpy().data)
    return state.hexdigest()


def _held(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """What this rank holds of a weight: its shard or the whole, and the scales of nf4."""
    # Under ZeRO-3 the shard is what every gathered copy is made from.
    yield _shard(parameter) if hasattr(parameter, "ds_tensor") else parameter
    quantised = getattr(parameter, "quant_state", None)
    if quantised is not None:
        scales = quantised.as_dict(packed=False)
        yield from (value for value in scales.values() if isinstance(value, torch.Tensor))


def _shard(parameter: Any) -> torch.Tensor:
    """This rank's shard of a weight under ZeRO-3, without what fills it up to the others' size,
    which is whatever was in memory."""
    held = parameter.ds_tensor.reshape(-1)
    first = dist.get_rank(parameter.ds_process_group) * held.numel()
    return held[: max(0, parameter.ds_numel - first)]


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for, whole, whatever it is stored as."""
    quantised = getattr(parameter, "quant_state", None)
    if quantised is not None:
        return quantised.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())

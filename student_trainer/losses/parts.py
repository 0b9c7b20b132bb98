"""A micro-batch that several teachers answered: its parts, and what is found of them in its order.

A tensor whose shape begins with N has an entry for every position with loss. Those of a teacher's
answer are called `TEACHER/NAME`, and `TEACHER/index_P` are the positions that it is about.

N positions with loss   P those of a part
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INDEX = "index_P"
Found = TypeVar(
    "Found", bound="DataclassInstance"
)  # a dataclass of tensors [P] and mappings to them, and a scalar `loss`


@dataclass(frozen=True, slots=True)
class BatchPart:
    """The positions of a batch that one teacher answered, and their tensors by plain names."""

    teacher: str | None  # None: the only one there is, who answered all of the batch
    index_P: Tensor | None
    batch: dict[str, Tensor]

    def of(self, value_N: Tensor) -> Tensor:
        """The part's entries of a tensor over all positions."""
        return value_N if self.index_P is None else value_N[self.index_P]


def parts_of(batch: dict[str, Tensor]) -> list[BatchPart]:
    """The parts of a batch; the whole batch where one teacher answered it."""
    owned: dict[str, dict[str, Tensor]] = {}
    common: dict[str, Tensor] = {}
    for key, tensor in batch.items():
        teacher, slash, name = key.rpartition("/")
        if slash:
            owned.setdefault(teacher, {})[name] = tensor
        elif name.rpartition("_")[2].startswith("N"):
            common[name] = tensor
    if not owned:
        return [BatchPart(None, None, batch)]
    found = []
    for teacher, own in owned.items():
        index_P = own.pop(INDEX)
        shared = {name: value_N[index_P] for name, value_N in common.items()}
        found.append(BatchPart(teacher, index_P, shared | own))
    return found


def put_together(parts: Sequence[BatchPart], found: Sequence[Found]) -> Found:
    """What was found of each part as if of the whole batch: losses are added, values of positions
    stand in its order."""
    if parts[0].index_P is None:
        return found[0]
    values: dict[str, Any] = {}
    for field in fields(found[0]):
        each = [getattr(one, field.name) for one in found]
        values[field.name] = sum(each) if field.name == "loss" else _joined(parts, each)
    return type(found[0])(**values)


def in_order(parts: Sequence[BatchPart], value_P: Sequence[Tensor]) -> Tensor:
    """Values of the positions of each part [P], in the order of the batch [N]."""
    if parts[0].index_P is None:
        return value_P[0]
    index_N = torch.cat([part.index_P for part in parts if part.index_P is not None])
    together_N = torch.cat(list(value_P))
    return torch.empty_like(together_N).index_copy_(0, index_N, together_N)


def _joined(parts: Sequence[BatchPart], each: Sequence[Any]) -> Any:
    """Tensors, mappings of tensors or None, of all parts alike."""
    if each[0] is None:
        return None
    if isinstance(each[0], Mapping):
        return {name: _joined(parts, [one[name] for one in each]) for name in each[0]}
    return in_order(parts, each)

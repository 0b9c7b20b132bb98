"""What the ranks of a run say to each other besides gradients, on the host and never on a GPU.

Every function is collective: all ranks call it, in the same order.
"""

from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from shared.errors import TutelageError

Value = TypeVar("Value")


class Ranks:
    """This rank among all ranks of the run."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        cpu = dist.get_backend() == "gloo"
        self._group: Any = None if cpu else dist.new_group(backend="gloo")

    @property
    def patience_s(self) -> float:
        """Seconds that ranks wait for each other before they fail."""
        group: Any = self._group or dist.group.WORLD
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over ranks of a float64 vector."""
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        dist.all_reduce(total, group=self._group)
        return total.numpy()

    def from_leader(self, value: Value | None) -> Value:
        """Rank 0's value on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, error: TutelageError | None) -> None:
        """Raise the first rank's error on every rank, so that all stop together; else return."""
        failed = self.sum(np.array([error is not None]))
        if failed[0]:
            raise next(e for e in self.gather(error) if e is not None)

    def wait(self) -> None:
        """Return once every rank is here."""
        self.sum(np.zeros(1))

"""The vocabulary as one process holds it: whole, or a shard of a head whose rows are spread over a
group of processes. Needs torch alone.

What the kernels do to logits passes through a `Vocab`. That of a whole head is plain torch; that of
a shard works on the rows it holds and exchanges numbers per position: sums, candidates for the most
likely ids, values of named ids. Every process of the group calls the same methods in the same order
and is given the same results, which are summed in the order of the ranks.

C positions of a chunk   V head rows   W of them held here   X ids or numbers of a position
K ids kept   B blocks of neighbouring ids   R ranks
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from teacher_service.scoring.largest import largest, largest_of_few

NO_ID = -1


@dataclass(frozen=True, slots=True)
class Running:
    """Running sums over the whole vocabulary, at the ends of the blocks held here."""

    ends_CB: Tensor
    whole_C1: Tensor  # the sum over everything
    first_C1: Tensor | None = None  # where the blocks held here begin; None where all are


@dataclass(frozen=True, slots=True)
class Vocab:
    """All rows of a head, held here."""

    rows: int  # of the head

    @property
    def widest(self) -> int:
        """Most rows that a process holds."""
        return self.rows

    def split(self, logits_CW: Tensor, shared: int) -> tuple[Tensor, Tensor]:
        """The logits held here of ids below `shared`, and of the others."""
        return logits_CW[:, :shared], logits_CW[:, shared:]

    def here(self, logits_CV: Tensor) -> Tensor:
        """Of the logits of all ids, those held here."""
        return logits_CV

    def largest(self, logits_CW: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The `size` largest of every position and their ids, largest first."""
        return largest(logits_CW, size)

    def every(self, logits_CW: Tensor) -> Tensor:
        """The logits of all processes side by side."""
        return logits_CW.clone()

    def of(self, logits_CW: Tensor, ids_CX: Tensor) -> Tensor:
        """The logits of ids."""
        return logits_CW.gather(1, ids_CX)

    def put_(self, values_CW: Tensor, ids_CX: Tensor, value: float | Tensor) -> Tensor:
        """Overwrite what is held here of ids, by one number or one of each [C, X]."""
        return values_CW.scatter_(1, ids_CX, value)

    def add_to_blocks_(self, sum_CB: Tensor, ids_CX: Tensor, mass_CX: Tensor, bits: int) -> None:
        """Add masses to the sums of the blocks of 2^bits ids that hold them, as far as held
        here."""
        sum_CB.scatter_add_(1, ids_CX >> bits, mass_CX)

    def sum(self, held: Tensor) -> Tensor:
        """What all processes hold together."""
        return held

    def peak(self, held: Tensor) -> Tensor:
        """The largest that any process holds."""
        return held

    def logsumexp(self, logits_CW: Tensor) -> Tensor:
        """Over all ids [C]."""
        return logits_CW.logsumexp(1)

    def entropy(self, logits_CW: Tensor) -> Tensor:
        """Of the distribution over all ids [C], nats."""
        return torch.special.entr(logits_CW.softmax(1)).sum(1)

    def running(self, sum_CB: Tensor) -> Running:
        """Running sums of what blocks hold."""
        ends_CB = sum_CB.cumsum(1)
        return Running(ends_CB, ends_CB[:, -1:])

    def found(self, ids_CK: Tensor, point_CK: Tensor, running: Running) -> Tensor:
        """The ids at points of the running sums, each from the process whose blocks hold it."""
        return ids_CK


@dataclass(frozen=True, slots=True)
class VocabShard(Vocab):
    """The rows `first` to `first + held` of a head; each rank holds `widest` but for the last ones,
    which hold what is left."""

    first: int
    held: int
    group: dist.ProcessGroup

    @property
    def widest(self) -> int:
        return -(-self.rows // self.group.size())

    def split(self, logits_CW: Tensor, shared: int) -> tuple[Tensor, Tensor]:
        here = min(max(shared - self.first, 0), self.held)
        return logits_CW[:, :here], logits_CW[:, here:]

    def here(self, logits_CV: Tensor) -> Tensor:
        return logits_CV[:, self.first : self.first + self.held]

    def largest(self, logits_CW: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Among the largest of each shard."""
        spare = max(0, size - logits_CW.shape[1])  # a shard may hold fewer ids than are wanted
        logits_CW = torch.nn.functional.pad(logits_CW, (0, spare), value=-torch.inf)
        values_CX, ids_CX = largest(logits_CW, size)
        values_CX, ids_CX = (
            torch.cat(self._all(part), dim=1) for part in (values_CX, ids_CX + self.first)
        )
        return largest_of_few(values_CX, size, ordered=True, ids=ids_CX)

    def every(self, logits_CW: Tensor) -> Tensor:
        spare = self.widest - logits_CW.shape[1]
        held = self._all(logits_CW.new_tensor([logits_CW.shape[1]]).long())
        parts = self._all(torch.nn.functional.pad(logits_CW, (0, spare)))
        return torch.cat([part[:, : int(num)] for part, num in zip(parts, held, strict=True)], 1)

    def of(self, logits_CW: Tensor, ids_CX: Tensor) -> Tensor:
        here_CX, place_CX = self._places(ids_CX)
        return self.sum(logits_CW.gather(1, place_CX).where(here_CX, 0.0))

    def put_(self, values_CW: Tensor, ids_CX: Tensor, value: float | Tensor) -> Tensor:
        here_CX, place_CX = self._places(ids_CX)
        position, column = here_CX.nonzero(as_tuple=True)
        put = value[position, column] if isinstance(value, Tensor) else values_CW.new_tensor(value)
        return values_CW.index_put_((position, place_CX[position, column]), put)

    def add_to_blocks_(self, sum_CB: Tensor, ids_CX: Tensor, mass_CX: Tensor, bits: int) -> None:
        here_CX, place_CX = self._places(ids_CX)
        sum_CB.scatter_add_(1, place_CX >> bits, mass_CX.where(here_CX, 0.0))

    def sum(self, held: Tensor) -> Tensor:
        return torch.stack(self._all(held)).sum(0)

    def peak(self, held: Tensor) -> Tensor:
        return torch.stack(self._all(held)).amax(0)

    def logsumexp(self, logits_CW: Tensor) -> Tensor:
        return torch.stack(self._all(logits_CW.logsumexp(1))).logsumexp(0)

    def entropy(self, logits_CW: Tensor) -> Tensor:
        log_sum_C1 = self.logsumexp(logits_CW)[:, None]
        return self.sum(torch.special.entr((logits_CW - log_sum_C1).exp()).sum(1))

    def running(self, sum_CB: Tensor) -> Running:
        """Where the blocks of one rank end those of the next begin, to the bit."""
        ends_CB = sum_CB.cumsum(1)
        ends_CR = torch.cat(self._all(ends_CB[:, -1:]), dim=1).cumsum(1)
        rank = self.group.rank()
        first_C1 = ends_CR[:, rank - 1, None] if rank else torch.zeros_like(ends_CR[:, :1])
        ends_CB = ends_CB + first_C1
        ends_CB[:, -1] = ends_CR[:, rank]
        return Running(ends_CB, ends_CR[:, -1:], first_C1)

    def found(self, ids_CK: Tensor, point_CK: Tensor, running: Running) -> Tensor:
        """`NO_ID` where nobody holds the point, since there is no mass."""
        assert running.first_C1 is not None, "running sums are this shard's"
        here_CK = (point_CK >= running.first_C1) & (point_CK < running.ends_CB[:, -1:])
        return self.peak(torch.where(here_CK, ids_CK + self.first, NO_ID))

    def _places(self, ids_CX: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are held here, and where; any place for the others."""
        place_CX = ids_CX - self.first
        return (place_CX >= 0) & (place_CX < self.held), place_CX.clamp(0, self.held - 1)

    def _all(self, held: Tensor) -> list[Tensor]:
        """What every rank holds, in their order."""
        held = held.contiguous()
        parts = [torch.empty_like(held) for _ in range(self.group.size())]
        dist.all_gather(parts, held, group=self.group)
        return parts

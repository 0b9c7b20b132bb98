"""The teacher's whole distribution from its last hidden states and its head, chunk by chunk.

N positions   n positions of a chunk   E teacher width   W rows of the teacher's head
K shared ids, the first K of both heads
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.kernel.chunk import head_logits
from student_trainer.losses.kernel.primitive import Head, precision
from student_trainer.losses.kernel.targets import Targets
from student_trainer.losses.kernel.top1 import Top1, top1


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """How the teacher turns its states into logits, and how many ids the student shares."""

    head: Head
    shared_vocab: int


@dataclass(frozen=True, slots=True)
class TeacherStates(Targets):
    """What the teacher shipped where it ships its last states: every shared id is kept, and the
    head's rows beyond them are the tail."""

    hidden_NE: Tensor  # in the teacher's own type
    teacher: TeacherHead

    @property
    def num_ids(self) -> int:
        """K."""
        return self.teacher.shared_vocab

    @property
    def kept_prefix(self) -> int:
        """K: all shared ids at every position."""
        return self.num_ids

    @property
    def reported_temperature(self) -> float:
        """1."""
        return 1.0

    def ids(self, rows: slice) -> Tensor:
        """The kept ids [n,K]: all shared ones, ascending."""
        size = len(self.hidden_NE[rows])
        return torch.arange(self.num_ids, device=self.hidden_NE.device).expand(size, -1)

    def kept(self, rows: slice) -> Tensor:
        """All of them [n,K]."""
        return torch.ones_like(self.ids(rows), dtype=torch.bool)

    @torch.no_grad()
    def logits(self, rows: slice, *, buffer: Tensor | None = None) -> Tensor:
        """The teacher's logits [n,W] of a chunk, in `buffer`, those of another, if that is large
        enough."""
        head, hidden_nE = self.teacher.head, self.hidden_NE[rows]
        if buffer is None or len(buffer) < len(hidden_nE):
            shape = (len(hidden_nE), head.vocabulary)
            buffer = hidden_nE.new_empty(shape, dtype=precision(hidden_nE))
        return head_logits(hidden_nE, head, out_nV=buffer[: len(hidden_nE)])

    @torch.no_grad()
    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The teacher's buckets at each temperature, from its logits.

        Where the student's vocabulary ends with the shared ids, so does the teacher's: rows it
        holds beyond are left out and the shared ids share their mass.
        """
        assert logits_nW is not None, "`logits` gave some"
        if vocabulary == self.num_ids:
            logits_nW = logits_nW[:, : self.num_ids]
        found: dict[float, Buckets] = {}
        for temperature in sorted(temperatures, reverse=True):
            scaled_nW = logits_nW if temperature == 1 else logits_nW / temperature
            log_p_nW = torch.log_softmax(scaled_nW, -1)
            tail_n = log_p_nW[:, self.num_ids :].logsumexp(-1)
            found[temperature] = Buckets(log_p_nW[:, : self.num_ids], tail_n)
        return found.__getitem__

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """The label's log-probability [n], from the chunk's buckets at temperature 1."""
        return teacher.kept_NK.gather(1, label_n[:, None])[:, 0]

    def captured_mass(self) -> Tensor:
        """All of it [N]: nothing is left out."""
        return torch.ones(len(self.hidden_NE), device=self.hidden_NE.device)

    def top1(self, label_N: Tensor) -> Top1:
        """From its logits, chunk by chunk."""
        return top1(self.hidden_NE, self.teacher.head, label_N)

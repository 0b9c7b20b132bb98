"""The average of several teachers' distributions, from the last states and the head of each.

N positions   n positions of a chunk   W rows of all heads, side by side   K ids that all share
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.kernel.chunk import head_logits
from student_trainer.losses.kernel.primitive import chunks, default_chunk_rows, precision
from student_trainer.losses.kernel.targets import Targets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.kernel.top1 import Top1


@dataclass(frozen=True, slots=True)
class AveragedHeads:
    """The heads of teachers that are averaged, and each one's share; the shares sum to 1."""

    heads: tuple[TeacherHead, ...]
    shares: tuple[float, ...]

    @staticmethod
    def of(heads: Sequence[TeacherHead], shares: Sequence[float]) -> "AveragedHeads":
        """Over the ids that the student shares with all of them; others are in each one's tail."""
        shared = min(head.shared_vocab for head in heads)
        return AveragedHeads(
            tuple(replace(head, shared_vocab=shared) for head in heads), tuple(shares)
        )


@dataclass(frozen=True, slots=True)
class AveragedStates(Targets):
    """sum_t share_t p_t, each p_t a teacher's distribution at the temperature. Exact, as every
    shared id is kept."""

    teachers: tuple[TeacherStates, ...]
    shares: tuple[float, ...]

    @property
    def num_ids(self) -> int:
        """K."""
        return self.teachers[0].num_ids

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
        return self.teachers[0].ids(rows)

    def kept(self, rows: slice) -> Tensor:
        """All of them [n,K]."""
        return self.teachers[0].kept(rows)

    @torch.no_grad()
    def logits(self, rows: slice, *, buffer: Tensor | None = None) -> Tensor:
        """The logits of all teachers side by side [n,W] of a chunk, in `buffer`, those of another,
        if that is large enough."""
        states = [teacher.hidden_NE[rows] for teacher in self.teachers]
        size = len(states[0])
        if buffer is None or len(buffer) < size:
            kind = precision(states[0])
            buffer = states[0].new_empty((size, sum(self._widths)), dtype=kind)
        parts = buffer[:size].split(self._widths, dim=1)
        for teacher, hidden_nE, part_nV in zip(self.teachers, states, parts, strict=True):
            head_logits(hidden_nE, teacher.teacher.head, out_nV=part_nV)
        return buffer[:size]

    @torch.no_grad()
    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The average's buckets at each temperature; see `TeacherStates.at`."""
        assert logits_nW is not None, "`logits` gave some"
        parts = logits_nW.split(self._widths, dim=1)
        each = [
            teacher.at(rows, part_nV, vocabulary=vocabulary, temperatures=temperatures)
            for teacher, part_nV in zip(self.teachers, parts, strict=True)
        ]
        return {t: self._average([of(t) for of in each]) for t in temperatures}.__getitem__

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """The label's log-probability [n], from the chunk's buckets at temperature 1."""
        return teacher.kept_NK.gather(1, label_n[:, None])[:, 0]

    def captured_mass(self) -> Tensor:
        """All of it [N]: nothing is left out."""
        return self.teachers[0].captured_mass()

    @torch.no_grad()
    def top1(self, label_N: Tensor) -> Top1:
        """From the average, chunk by chunk."""
        found = []
        size = default_chunk_rows(sum(self._widths), num_ids=1)
        for rows in chunks(len(label_N), rows_per_chunk=size):
            asked = {"vocabulary": 0, "temperatures": (1.0,)}
            highest_n, id_n = self.at(rows, self.logits(rows), **asked)(1.0).kept_NK.max(-1)
            found.append((highest_n.exp(), id_n == label_N[rows], id_n))
        return Top1(*(torch.cat(values) for values in zip(*found, strict=True)))

    @property
    def _widths(self) -> list[int]:
        return [teacher.teacher.head.vocabulary for teacher in self.teachers]

    def _average(self, each: Sequence[Buckets]) -> Buckets:
        kept_NK, tail_N = None, None
        for one, share in zip(each, self.shares, strict=True):
            own_NK, own_N = one.kept_NK + math.log(share), one.tail_N + math.log(share)
            kept_NK = own_NK if kept_NK is None else torch.logaddexp(kept_NK, own_NK)
            tail_N = own_N if tail_N is None else torch.logaddexp(tail_N, own_N)
        assert kept_NK is not None
        assert tail_N is not None
        return Buckets(kept_NK, tail_N)

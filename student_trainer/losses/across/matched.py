"""A teacher of another tokenizer at the student's positions: which of its outcomes are compared
with which of the student's.

Where both begin a token after the same bytes, their distributions stand beside each other;
elsewhere nothing is compared, and both have all mass in the tail, where no divergence finds a
difference.
`ByBytes` pairs tokens that are the same bytes, or groups of tokens whose text begins alike,
`ByRank` the likeliest with the likeliest.

N positions   n positions of a chunk   K ids of the teacher per position   S temperatures
V student vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.across.spans import Spans
from student_trainer.losses.kernel.buckets import Buckets, teacher_distribution
from student_trainer.losses.kernel.targets import IdsPerPosition


@dataclass(frozen=True, slots=True)
class Matched(IdsPerPosition):
    """Common to both: what the teacher shipped, at the student's positions."""

    absent_NK: Tensor  # bool, outcomes that the other model does not have
    logprobs_NK: Tensor  # float32, temperature 1, normalised over the teacher's vocabulary
    log_tail_NS: Tensor  # float32; 0 where nothing is compared
    temperatures: tuple[float, ...]

    @property
    def reported_temperature(self) -> float:
        """1."""
        return 1.0

    def kept(self, rows: slice) -> Tensor:
        """Those that both have [n,K]."""
        return ~self.absent_NK[rows]

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """Refused: its label may be another token."""
        raise AssertionError("a term that needs the label on its own takes one tokenizer")

    def top1(self, label_N: Tensor) -> None:
        """None: its likeliest token need not be one of the student's."""
        return None

    def _shipped(self, rows: slice, temperature: float) -> Buckets:
        log_tail_n = self.log_tail_NS[rows, self.temperatures.index(temperature)]
        return teacher_distribution(self.logprobs_NK[rows], log_tail_n, temperature=temperature)


@dataclass(frozen=True, slots=True)
class ByBytes(Matched):
    """The teacher's ids are those of the student that are the same bytes, or its groups'; all
    others of either are in its tail. `spans` are compared beside it."""

    spans_N: Spans | None = None
    group_V: Tensor | None = None  # int64, the group of each of the student's ids

    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The teacher's buckets of a chunk as a function of the temperature; without a tail where
        the student's whole `vocabulary` is paired, as `TeacherTargets` has it."""
        absent_nK = self.absent_NK[rows]

        def buckets(temperature: float) -> Buckets:
            shipped = self._shipped(rows, temperature)
            if self.group_V is not None or self.num_ids >= vocabulary:
                outcomes = self._outcomes(vocabulary)
                shipped = self._without_tail(rows, shipped, temperature, outcomes=outcomes)
            return _folded(shipped, absent_nK)

        return buckets

    def beside(self, rows: slice, student: Buckets) -> Buckets:
        """The student's buckets, where outcomes that it does not have are at 0."""
        return Buckets(
            student.kept_NK.masked_fill(self.absent_NK[rows], -torch.inf), student.tail_N
        )

    def spans(self, rows: slice) -> Spans | None:
        """The spans of a chunk."""
        return None if self.spans_N is None else self.spans_N.part(rows)

    def captured_mass(self) -> Tensor:
        """Teacher mass on tokens that both have [N], 0 where nothing is compared."""
        folded = _folded(self._shipped(slice(None), 1.0), self.absent_NK)
        return -torch.expm1(folded.tail_N)

    def groups(self) -> Tensor | None:
        """See `Targets`."""
        return self.group_V

    def _outcomes(self, vocabulary: int) -> Tensor | int:
        """The student's ids, or their groups, each of which has the name of one of its ids."""
        if self.group_V is None:
            return vocabulary
        return (self.group_V == torch.arange(vocabulary, device=self.group_V.device)).sum()

    def _without_tail(
        self, rows: slice, shipped: Buckets, temperature: float, *, outcomes: Tensor | int
    ) -> Buckets:
        """The same, with all mass on the kept ids where these are the student's every outcome."""
        absent_nK = self.absent_NK[rows]
        is_whole_n = (~absent_nK).sum(-1) >= outcomes
        nothing_n = torch.full_like(shipped.tail_N, -torch.inf)
        paired_nK = self.logprobs_NK[rows].masked_fill(absent_nK, -torch.inf)
        paired_nK = torch.where(is_whole_n[:, None], paired_nK, 0.0)
        whole = teacher_distribution(paired_nK, nothing_n, temperature=temperature)
        kept_nK = torch.where(is_whole_n[:, None], whole.kept_NK, shipped.kept_NK)
        return Buckets(kept_nK, torch.where(is_whole_n, nothing_n, shipped.tail_N))


@dataclass(frozen=True, slots=True)
class ByRank(Matched):
    """The teacher's probabilities and the student's, each from the largest down (ULD, arXiv
    2402.12030); the ids are the student's likeliest. `absent_NK` are ranks that it has not."""

    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The teacher's buckets of a chunk as a function of the temperature: those of ranks beyond
        K are its tail."""

        def buckets(temperature: float) -> Buckets:
            shipped = self._shipped(rows, temperature)
            return Buckets(_sorted(shipped.kept_NK), shipped.tail_N)

        return buckets

    def beside(self, rows: slice, student: Buckets) -> Buckets:
        """The student's buckets, from the largest down; none at 0, so that a KL is a number."""
        kept_nK = student.kept_NK.masked_fill(self.absent_NK[rows], -torch.inf)
        return Buckets(_sorted(kept_nK), student.tail_N).without_zeros()

    def captured_mass(self) -> Tensor:
        """Teacher mass on the ranks compared [N]."""
        return self._shipped(slice(None), 1.0).kept_NK.exp().sum(-1)


def _folded(teacher: Buckets, absent_NK: Tensor) -> Buckets:
    """The teacher's buckets with the mass of outcomes that the student does not have in the
    tail."""
    others_N = teacher.kept_NK.masked_fill(~absent_NK, -torch.inf).logsumexp(-1)
    kept_NK = teacher.kept_NK.masked_fill(absent_NK, -torch.inf)
    return Buckets(kept_NK, torch.logaddexp(teacher.tail_N, others_N))


def _sorted(kept_nK: Tensor) -> Tensor:
    return kept_nK.sort(dim=-1, descending=True, stable=True).values

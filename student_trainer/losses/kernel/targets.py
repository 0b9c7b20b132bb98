"""What the objective asks of a teacher's answer, whatever it holds, and the usual one: ranked ids.

N positions   n positions of a chunk   K ids kept per position   S temperatures shipped
W rows of the teacher's head   V student vocabulary
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.across.spans import Spans
from student_trainer.losses.kernel.buckets import Buckets, teacher_distribution
from student_trainer.losses.kernel.top1 import Top1


class Targets(ABC):
    """A teacher's answer at the positions of a micro-batch, on the student's device."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """K."""

    @property
    @abstractmethod
    def kept_prefix(self) -> int | None:
        """K where the kept ids are the first K of the vocabulary, ascending, at every position;
        else None."""

    @property
    @abstractmethod
    def reported_temperature(self) -> float:
        """That of the KL and of the student's unseen mass."""

    @abstractmethod
    def ids(self, rows: slice) -> Tensor:
        """The kept ids of a chunk [n,K]."""

    @abstractmethod
    def kept(self, rows: slice) -> Tensor:
        """Marks every id of a chunk once, bool [n,K]."""

    @abstractmethod
    def logits(self, rows: slice, *, buffer: Tensor | None) -> Tensor | None:
        """The teacher's logits [n,W] of a chunk, in `buffer`, those of another, if that is large
        enough; None where it ships log-probabilities."""

    @abstractmethod
    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The teacher's buckets of a chunk as a function of the temperature, one of
        `temperatures`, for a student of so many ids; `logits_nW` are what `logits` gave."""

    @abstractmethod
    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """The label's log-probability [n]; `teacher` are the buckets at temperature 1."""

    @abstractmethod
    def captured_mass(self) -> Tensor:
        """Teacher mass on the kept ids [N]."""

    @abstractmethod
    def top1(self, label_N: Tensor) -> Top1 | None:
        """The teacher's likeliest ids beside the labels; None where it does not say."""

    def beside(self, rows: slice, student: Buckets) -> Buckets:
        """The student's buckets of a chunk as they stand beside the teacher's: as they are."""
        return student

    def spans(self, rows: slice) -> Spans | None:
        """Spans of several tokens that are compared too; None: none are."""
        return None

    def groups(self) -> Tensor | None:
        """The group of each of the student's ids [V], whose names the kept ids are then; None:
        every id stands for itself."""
        return None


@dataclass(frozen=True, slots=True)
class IdsPerPosition(Targets):
    """Common to `Targets` in which every position has ids of its own."""

    ids_NK: Tensor  # int64

    @property
    def num_ids(self) -> int:
        """K."""
        return self.ids_NK.shape[1]

    @property
    def kept_prefix(self) -> None:
        """None: no position has the others' ids."""
        return None

    def ids(self, rows: slice) -> Tensor:
        """The kept ids of a chunk [n,K]."""
        return self.ids_NK[rows]

    def logits(self, rows: slice, *, buffer: Tensor | None) -> None:
        """None: such a teacher ships log-probabilities or weights."""
        return None


@dataclass(frozen=True, slots=True)
class TeacherTargets(IdsPerPosition):
    """Ids that the teacher ranked highest and the exact mass of all others."""

    logprobs_NK: Tensor  # float32, temperature 1, normalised over the teacher's vocabulary
    log_tail_NS: Tensor  # float32, exact log-mass outside the kept ids per temperature
    temperatures: tuple[float, ...]  # S, with 1 among them
    label_logprob_N: Tensor | None = None  # float32, exact
    renormalised: bool = False  # whether the tail is left out, as if the kept ids were everything

    @property
    def reported_temperature(self) -> float:
        """1."""
        return 1.0

    def kept(self, rows: slice) -> Tensor:
        """All of them [n,K]: none repeats."""
        return torch.ones_like(self.ids_NK[rows], dtype=torch.bool)

    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The teacher's buckets of a chunk as a function of the temperature.

        A student whose whole `vocabulary` is kept has no tail; the mass of a larger teacher's
        padding rows, which it cannot hold, is then left out and the kept ids share it.
        """

        def buckets(temperature: float) -> Buckets:
            log_tail_n = self.log_tail_NS[rows, self.temperatures.index(temperature)]
            if self.renormalised or self.num_ids >= vocabulary:
                log_tail_n = torch.full_like(log_tail_n, -torch.inf)
            return teacher_distribution(self.logprobs_NK[rows], log_tail_n, temperature=temperature)

        return buckets

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """The label's log-probability [n], as shipped."""
        assert self.label_logprob_N is not None, "a term needs the label's log-probability"
        return self.label_logprob_N[rows]

    def captured_mass(self) -> Tensor:
        """Teacher mass on the kept ids at temperature 1 [N], from the exact tail."""
        return -torch.expm1(self.log_tail_NS[:, self.temperatures.index(1.0)])

    def top1(self, label_N: Tensor) -> Top1:
        """Its first choice, which is always kept."""
        highest_N, rank_N = self.logprobs_NK.max(-1)
        id_N = self.ids_NK.gather(1, rank_N[:, None])[:, 0]
        return Top1(highest_N.exp(), id_N == label_N, id_N)


@dataclass(frozen=True, slots=True)
class SoftLabelTargets(TeacherTargets):
    """All outcomes, with probabilities that are a target as they are: at every temperature of the
    student they are those of temperature 1."""

    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """See `TeacherTargets`."""
        known = TeacherTargets.at(
            self, rows, logits_nW, vocabulary=vocabulary, temperatures=temperatures
        )
        return lambda temperature: known(1.0)

"""What each position of a unit counts, formed in the forward pass in which it is learnt.

A weighting sees a unit's positions alone, and a state of the steps before that is the same on all
ranks; so what it forms does not depend on how a step is cut, and needs no pass over the step
before, as a weigher does. It is added by a section of the config and an entry in `POLICIES`.

N positions with loss of a unit   D domains in config order   F further sums of a policy
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.kernel.top1 import Top1
from student_trainer.state.stateful import Stateful
from student_trainer.weighing.weigher import Look

# What every weighting reports of a position, by the names of `DomainMetrics`: whether it is learnt,
# 0 or 1, and what it counts in the losses that ask the teacher.
REPORTED = ("selected_share", "mean_weight")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a unit's positions as they are learnt, without gradients."""

    label_logprob_N: Tensor  # the teacher's, nats
    captured_mass: Callable[[], Tensor | None]  # on the teacher's kept ids; None: keeps none
    entropy_N: Tensor | None  # the teacher's, nats, where it ships it: with drawn ids
    student: Mapping[Look, Tensor]  # what the weighting looks at, [N]
    domain_N: Tensor  # int64
    document_N: Tensor  # int64, the document of the unit that a position belongs to
    vocabulary: int  # the student's
    # The teacher's likeliest outcome of each position; None where it does not say.
    teacher_top1: Callable[[], Top1 | None] = lambda: None
    changed_N: Tensor | None = None  # int64, see `CHANGED`; None where no document is changed

    def mean_by_document(self, value_N: Tensor) -> Tensor:
        """The mean of each position's document, float64 [N]; a document lies in one unit whole."""
        size = int(self.document_N.max()) + 1 if len(self.document_N) else 0
        sums, counts = torch.zeros(2, size, dtype=torch.float64, device=value_N.device)
        sums.index_add_(0, self.document_N, value_N.double())
        counts.index_add_(0, self.document_N, torch.ones_like(value_N, dtype=torch.float64))
        return (sums / counts)[self.document_N]


@dataclass(frozen=True, slots=True)
class PositionWeights:
    """What each position counts, [N], without gradients."""

    taught_N: Tensor  # in losses that ask the teacher
    text_N: Tensor  # in the cross-entropy with the text
    reports: Mapping[str, Tensor]  # by the names of `Weighting.reported`
    policy_F: Tensor | None = None  # further sums over the unit, float64 [F]

    def in_loss(self, *, asks_teacher: bool, text: bool) -> Tensor | None:
        """What they count in a loss; None in one that is about neither, as that of routers."""
        if asks_teacher:
            return self.taught_N
        return self.text_N if text else None

    def reported_with(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `REPORTED` and its own; `counts` is what positions count in each loss."""
        learnt_N = torch.zeros_like(self.taught_N, dtype=torch.bool)
        for weight_N in counts.values():
            learnt_N = learnt_N | (weight_N != 0)
        return dict(zip(REPORTED, (learnt_N, self.taught_N), strict=True)) | dict(self.reports)


@dataclass(frozen=True, slots=True)
class StepMeans:
    """What a weighting reported of a whole step, all ranks."""

    sums: Mapping[str, np.ndarray]  # by name, float64 [D]
    tokens_D: np.ndarray  # positions that they are sums over
    step: int  # steps behind the next one
    policy_F: np.ndarray = field(default_factory=lambda: np.zeros(0))  # further sums of the policy

    def means(self, name: str) -> np.ndarray:
        """By domain and over all of them, float64 [D + 1]; NaN without tokens."""
        sums_D, tokens_D = self.sums[name], self.tokens_D.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.append(sums_D, sums_D.sum()) / np.append(tokens_D, tokens_D.sum())


class Weighting(Stateful, Protocol):
    """A policy with its state."""

    reported: ClassVar[tuple[str, ...]]  # beside `REPORTED`, fields of `DomainMetrics`
    looks: ClassVar[frozenset[Look]]  # what it wants to know of the student
    way_out: ClassVar[str]  # what to change where it leaves a step empty, for a sentence

    def weights(self, seen: Seen) -> PositionWeights:
        """What the positions of a unit count, from the state before the step."""
        ...

    def follow(self, step: StepMeans) -> None:
        """Move the state on after a step with tokens; all ranks alike."""
        ...


class RunningMeans:
    """Exponential running means by domain and over all, free of the bias of their beginning.

    With x the means of a step and d the decay, s = d s + (1 - d) x, n = d n + (1 - d), and the
    value is s / n. A domain that a step has no tokens of stays as it is.
    """

    def __init__(self, decay: float, *, num_domains: int) -> None:
        self._decay = decay
        self._sums, self._norms = np.zeros((2, num_domains + 1))

    def follow(self, means: np.ndarray) -> None:
        """Count in the means of a step, [D + 1] as `StepMeans` has them."""
        seen = np.isfinite(means)
        self._sums[seen] = self._decay * self._sums[seen] + (1 - self._decay) * means[seen]
        self._norms[seen] = self._decay * self._norms[seen] + (1 - self._decay)

    @property
    def values(self) -> np.ndarray:
        """Float64 [D + 1]; NaN where there was nothing yet."""
        with np.errstate(invalid="ignore"):
            return self._sums / self._norms

    def state(self) -> list[list[float]]:
        """As JSON takes it."""
        return [self._sums.tolist(), self._norms.tolist()]

    def restore(self, state: list[list[float]]) -> None:
        """Become what `state` was written from."""
        self._sums, self._norms = np.array(state, np.float64)

"""A teacher of whom drawn ids are known: they stand for all of its ids, with weights.

A weight's expectation over draws is the id's probability, so that sums of p are estimated without
bias; log q is normalised over the student's whole vocabulary, and there is no tail to compare.

N positions   n positions of a chunk   K ids kept per position   W rows of the teacher's head
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, DrawnBuckets
from student_trainer.losses.kernel.targets import IdsPerPosition


@dataclass(frozen=True, slots=True)
class DrawnTargets(IdsPerPosition):
    """What such a teacher shipped, decoded, on the student's device: `Targets`. Its ids ascend; a
    repeated one counts as often as it stands."""

    log_weights_NK: Tensor  # float32; the weights of a position sum to 1
    log_tail_N: Tensor  # float32, exact log-mass of what is estimated
    entropy_N: Tensor  # float32, nats, of the teacher's whole distribution
    temperature: float  # of the distribution drawn from

    @property
    def reported_temperature(self) -> float:
        """The one that ids are drawn at."""
        return self.temperature

    def kept(self, rows: slice) -> Tensor:
        """Marks every id of a chunk once, bool [n,K]."""
        ids_nK = self.ids_NK[rows]
        kept_nK = torch.ones_like(ids_nK, dtype=torch.bool)
        kept_nK[:, 1:] = ids_nK[:, 1:] != ids_nK[:, :-1]
        return kept_nK

    def at(
        self,
        rows: slice,
        logits_nW: Tensor | None,
        *,
        vocabulary: int,
        temperatures: Sequence[float],
    ) -> Callable[[float], Buckets]:
        """The weights of a chunk, at the temperature of the draw alone."""

        def buckets(temperature: float) -> Buckets:
            assert temperature == self.temperature, "ids are drawn at one temperature"
            nothing_n = torch.full_like(self.log_tail_N[rows], -torch.inf)
            return DrawnBuckets(self.log_weights_NK[rows], nothing_n, self.entropy_N[rows])

        return buckets

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """Refused: drawn ids do not tell it."""
        raise AssertionError("a term that needs the label on its own takes no drawn ids")

    def captured_mass(self) -> Tensor:
        """Teacher mass that is not estimated [N]: on the ids kept exactly or, where all are drawn,
        on those that were."""
        return -torch.expm1(self.log_tail_N)

    def top1(self, label_N: Tensor) -> None:
        """None: the likeliest id need not be drawn."""
        return None

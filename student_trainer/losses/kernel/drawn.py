"""A teacher of whom drawn ids are known: they stand for all of its ids, with weights.

A weight's expectation over draws is the id's probability, so that sums of p are estimated without
bias; log q is normalised over the student's whole vocabulary, and there is no tail to compare.

N positions   n positions of a chunk   K ids kept per position
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, DrawnBuckets


@dataclass(frozen=True, slots=True)
class DrawnTargets:
    """What such a teacher shipped, decoded, on the student's device. Stands in for
    `objective.TeacherTargets`."""

    ids_NK: Tensor  # int64, ascending; a repeated id counts as often as it stands
    log_weights_NK: Tensor  # float32; the weights of a position sum to 1
    log_tail_N: Tensor  # float32, exact log-mass of what is estimated
    entropy_N: Tensor  # float32, nats, of the teacher's whole distribution
    temperature: float  # of the distribution drawn from

    @property
    def num_ids(self) -> int:
        """K."""
        return self.ids_NK.shape[1]

    def ids(self, rows: slice) -> Tensor:
        """The kept ids of a chunk [n,K]."""
        return self.ids_NK[rows]

    def kept(self, rows: slice) -> Tensor:
        """Marks every id of a chunk once, bool [n,K]."""
        ids_nK = self.ids_NK[rows]
        kept_nK = torch.ones_like(ids_nK, dtype=torch.bool)
        kept_nK[:, 1:] = ids_nK[:, 1:] != ids_nK[:, :-1]
        return kept_nK

    def at(self, rows: slice, *, vocabulary: int) -> Callable[[float], Buckets]:
        """The weights of a chunk, at the temperature of the draw alone."""

        def buckets(temperature: float) -> Buckets:
            assert temperature == self.temperature, "ids are drawn at one temperature"
            nothing_n = torch.full_like(self.log_tail_N[rows], -torch.inf)
            return DrawnBuckets(self.log_weights_NK[rows], nothing_n, self.entropy_N[rows])

        return buckets

    def captured_mass(self) -> Tensor:
        """Teacher mass that is not estimated [N]: on the ids kept exactly or, where all are drawn,
        on those that were."""
        return -torch.expm1(self.log_tail_N)

"""Token temperatures: hard tokens are compared cold, easy ones warm (arXiv 2510.11615).

With h the Hellinger distance of teacher and student at a token, at temperature 1 and without a
gradient, and m its median over the tokens that a step learns from, the values are

    u   = tanh(log(h / m)), rounded to the nearest of evenly spaced levels from -1 to 1
    tau = exp(-c u)
    tau^2 D(p_tau, q_tau), D the reverse KL or the forward one

where the published code does not round u, which asks for a temperature of its own at every token,
and so for the whole vocabulary; at a level the teacher ships the exact mass of what it does not
name. In the published code h has a gradient, here tau is a constant of the step. The published
share of tokens moves with the loss, here it is fixed.

n positions of a chunk
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.terms.divergences import forward_kl, reverse_kl
from student_trainer.losses.terms.term import ChunkView, Needs, TermValues


@dataclass(frozen=True, slots=True)
class TokenTemperature:
    """The term; a step's weigher says at which temperature each token is compared, and what it
    counts, which its values include."""

    reported: ClassVar[tuple[str, ...]] = ()

    section: Any  # of the config: weight, temperatures, divergence

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """Both distributions at every level's temperature, and the level of each position."""
        return Needs(self.section.temperatures, columns=("level_N", "level_weight_N"))

    @property
    def is_kl_at(self) -> None:
        """None."""
        return None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """tau^2 D at the temperature of each position's level, times what it counts."""
        level_n, weight_n = chunk.columns["level_N"], chunk.columns["level_weight_N"]
        divergence = reverse_kl if self.section.divergence == "reverse_kl" else forward_kl
        values_n = torch.zeros_like(chunk.label_logprob_n)
        for level, temperature in enumerate(self.section.temperatures):
            place_m = torch.nonzero((level_n == level) & (weight_n > 0)).squeeze(1)
            pair = (_picked(buckets, place_m) for buckets in chunk.pair(temperature))
            found_m = temperature**2 * weight_n[place_m] * divergence(*pair)
            values_n = values_n.index_put((place_m,), found_m)
        return TermValues(values_n)


@dataclass(frozen=True, slots=True)
class Hellinger:
    """sqrt(sum (sqrt p - sqrt q)^2 / 2) at temperature 1, from 0 to 1, as a term that is looked at
    and not learnt; over the kept ids and the tail a lower bound of that over all ids."""

    reported: ClassVar[tuple[str, ...]] = ()

    weight: float = 1.0
    is_kl_at: None = None

    @property
    def needs(self) -> Needs:
        """Both distributions."""
        return Needs((1.0,))

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """The distance of each position."""
        return TermValues(hellinger(*chunk.pair(1.0)))


def hellinger(teacher: Buckets, student: Buckets) -> Tensor:
    """See `Hellinger`; [N]."""
    kept_N = ((teacher.kept_NK / 2).exp() - (student.kept_NK / 2).exp()).square().sum(-1)
    tail_N = ((teacher.tail_N / 2).exp() - (student.tail_N / 2).exp()).square()
    return ((kept_N + tail_N) / 2).sqrt()


def _picked(buckets: Buckets, place_m: Tensor) -> Buckets:
    return Buckets(buckets.kept_NK[place_m], buckets.tail_N[place_m])

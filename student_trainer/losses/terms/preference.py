"""Preference distillation: what the student prefers, beyond what its teacher does (LLaVA-MoD, arXiv
2408.15881, whose reference is the teacher).

With r the student's less the teacher's log-probability of a whole response, r+ of the chosen and r-
of the rejected one, and s the logistic function, a pair's loss is

    -log s(beta (r+ - r-))                                              (dpo)
    mean of 1 - s(beta (r+ - kl-)) and 1 - s(beta (kl+ - r-))           (kto_pair)

where kl is max(0, mean of r over the step's pairs), without gradient. A step's weigher sees whole
pairs and forms value and slope; the term spreads them over a pair's positions.

n positions of a chunk
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from student_trainer.losses.terms.term import ChunkView, Needs, TermValues


@dataclass(frozen=True, slots=True)
class Preference:
    """The term; its step mean is that over pairs, since columns hold tokens over pairs."""

    reported: ClassVar[tuple[str, ...]] = ()

    section: Any  # of the config: weight

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """A position's share of its pair's loss, and the slope in its log-probability."""
        return Needs(columns=("preference_N", "preference_slope_N"))

    @property
    def is_kl_at(self) -> None:
        """None."""
        return None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """The share, with the slope as its gradient."""
        label_n, columns = chunk.label_logprob_n, chunk.columns
        moved_n = columns["preference_slope_N"] * (label_n - label_n.detach())
        return TermValues(columns["preference_N"] + moved_n)

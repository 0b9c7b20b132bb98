"""Policies that only tests have."""

from dataclasses import dataclass
from typing import Literal

from cluster.control.policies import Decision, Weights
from shared.config.mixture import AdaptiveMixture
from shared.mixture.weight_log import DomainReport, WeightLog


class LargestGapMixture(AdaptiveMixture):
    """Everything for the domain where the student lags most, but for a share of all others."""

    policy: Literal["largest_gap"] = "largest_gap"
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class LargestGapPolicy:
    """Gives `share` to the domain with the largest gap, and the rest as the corpus has it."""

    mixture: LargestGapMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        return Decision(self.natural)

    def first(self, report: DomainReport) -> Decision:
        return self.opening()

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        sums = zip(report.student_nll_sums, report.num_tokens, report.teacher_nlls, strict=True)
        gaps = [student / tokens - teacher for student, tokens, teacher in sums]
        others = [(1 - self.mixture.share) * weight for weight in self.natural]
        others[gaps.index(max(gaps))] += self.mixture.share
        return Decision(tuple(others))

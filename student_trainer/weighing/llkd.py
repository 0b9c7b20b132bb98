"""Learn where the teacher is confident and the student uncertain (LLKD, arXiv 2411.08028).

With c the teacher's probability of the label and u the student's entropy over that of a uniform
distribution, a position of domain g is learnt where c >= T(g) and u >= S(g), and then counts

    w = c u / m,   m the running mean of c u over learnt positions and 0 over others

so that a step's weights have a mean of about 1. With C the running mean of c over all text and C(g)
that of a domain,

    T(g) = a C C(g) / max over domains of C(h)

so that the domain of the largest has a C itself; likewise S(g) with b and u. Running means are of
the steps before: the first step learns everything, with m = 1. Of whole documents, c is the
geometric mean of its labels' probabilities and u the mean of its tokens'.

The paper classifies rows by the teacher's labels; its thresholds by class are here by domain, and
those of every step follow the steps before it, where FreeMatch, whose form they have, includes the
step itself. That, its normalisation, and the way to text are ours.

N positions with loss of a unit   D domains in config order
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shared.config.weighting import LLKD
from student_trainer.weighing.weigher import Look
from student_trainer.weighing.weighting import PositionWeights, RunningMeans, Seen, StepMeans


class LLKDWeighting:
    """The policy with its running means; satisfies `Weighting`."""

    reported: ClassVar[tuple[str, ...]] = ("teacher_confidence", "student_uncertainty")
    looks: ClassVar[frozenset[Look]] = frozenset({"entropy"})
    way_out: ClassVar[str] = "lower weighting.confidence or weighting.uncertainty, 0 for no gate"

    def __init__(self, section: LLKD, *, num_domains: int) -> None:
        self._section = section
        self._means = {
            name: RunningMeans(section.decay, num_domains=num_domains)
            for name in (*self.reported, "mean_weight")
        }

    def weights(self, seen: Seen) -> PositionWeights:
        """c u / m of learnt positions and 0 of others; a value that is no number stays one."""
        confidence_N, uncertainty_N = self._signals(seen)
        below_N = torch.zeros_like(confidence_N, dtype=torch.bool)
        for value_N, threshold_D in (
            (confidence_N, self.confidence_thresholds()),
            (uncertainty_N, self.uncertainty_thresholds()),
        ):
            threshold_D = torch.as_tensor(threshold_D, device=value_N.device)
            below_N |= value_N < threshold_D[seen.domain_N]
        weight_N = (confidence_N * uncertainty_N / self.mean_weight()).masked_fill(below_N, 0.0)
        reports = dict(zip(self.reported, (confidence_N, uncertainty_N), strict=True))
        return PositionWeights(weight_N, weight_N, reports)

    def _signals(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """c and u, float64 [N]."""
        label_logprob_N = seen.label_logprob_N.double()
        entropy_N = seen.student["entropy"].double()
        if self._section.unit == "document":
            label_logprob_N = seen.mean_by_document(label_logprob_N)
            entropy_N = seen.mean_by_document(entropy_N)
        return label_logprob_N.exp(), entropy_N / math.log(seen.vocabulary)

    def confidence_thresholds(self) -> np.ndarray:
        """T of each domain, float64 [D]."""
        return self._thresholds("teacher_confidence", self._section.confidence)

    def uncertainty_thresholds(self) -> np.ndarray:
        """S of each domain, float64 [D]."""
        return self._thresholds("student_uncertainty", self._section.uncertainty)

    def mean_weight(self) -> float:
        """m."""
        value = float(self._means["mean_weight"].values[-1])
        return 1.0 if math.isnan(value) else value

    def _thresholds(self, name: str, scale: float) -> np.ndarray:
        """0 of a domain, or of all, that nothing is known of."""
        *by_domain, overall = self._means[name].values.tolist()
        mean_D = np.nan_to_num(by_domain)
        if not self._section.by_domain:
            mean_D = np.ones_like(mean_D)
        return scale * np.nan_to_num(overall) * (mean_D / (mean_D.max() or 1.0))

    def follow(self, step: StepMeans) -> None:
        """See `Weighting`."""
        mean_weight = self.mean_weight()
        for name in self.reported:
            self._means[name].follow(step.means(name))
        self._means["mean_weight"].follow(step.means("mean_weight") * mean_weight)

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {name: means.state() for name, means in self._means.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        for name, means in self._means.items():
            means.restore(state[name])

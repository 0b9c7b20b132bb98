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

Where rows have classes and `by` says so, as it does by default, g is the class that the teacher
thinks likeliest and c its probability, as in the paper, which classifies rows by the teacher's
labels; text has domains in their place. The thresholds of every step follow the steps before it,
where FreeMatch, whose form they have, includes the step itself. That, its normalisation, and the
way to text are ours.

N positions with loss of a unit   D domains in config order   C classes   G groups: D, or C
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shared.config.weighting import LLKD
from student_trainer.weighing.weigher import Look
from student_trainer.weighing.weighting import PositionWeights, RunningMeans, Seen, StepMeans

# What is summed up by class: c and u of its rows, how many those are and how many are learnt.
BY_CLASS = ("teacher_confidence", "student_uncertainty", "rows", "selected")


class LLKDWeighting:
    """The policy with its running means, by class where there are `num_classes`; satisfies
    `Weighting`."""

    reported: ClassVar[tuple[str, ...]] = ("teacher_confidence", "student_uncertainty")
    looks: ClassVar[frozenset[Look]] = frozenset({"entropy"})
    way_out: ClassVar[str] = "lower weighting.confidence or weighting.uncertainty, 0 for no gate"

    def __init__(self, section: LLKD, *, num_domains: int, num_classes: int = 0) -> None:
        self._section, self._num_classes = section, num_classes
        groups = dict.fromkeys(self.reported, num_classes or num_domains)
        self._means = {
            name: RunningMeans(section.decay, num_domains=groups.get(name, num_domains))
            for name in (*self.reported, "mean_weight")
        }

    def weights(self, seen: Seen) -> PositionWeights:
        """c u / m of learnt positions and 0 of others; a value that is no number stays one."""
        confidence_N, uncertainty_N, group_N = self._signals(seen)
        below_N = torch.zeros_like(confidence_N, dtype=torch.bool)
        for value_N, threshold_G in (
            (confidence_N, self.confidence_thresholds()),
            (uncertainty_N, self.uncertainty_thresholds()),
        ):
            threshold_G = torch.as_tensor(threshold_G, device=value_N.device)
            below_N |= value_N < threshold_G[group_N]
        weight_N = (confidence_N * uncertainty_N / self.mean_weight()).masked_fill(below_N, 0.0)
        reports = dict(zip(self.reported, (confidence_N, uncertainty_N), strict=True))
        sums = self._by_class(group_N, confidence_N, uncertainty_N, learnt_N=~below_N)
        return PositionWeights(weight_N, weight_N, reports, policy_F=sums)

    def _by_class(
        self, class_N: Tensor, confidence_N: Tensor, uncertainty_N: Tensor, *, learnt_N: Tensor
    ) -> Tensor | None:
        """Sums of `BY_CLASS`, float64, flat [4 C]; None without classes."""
        if not self._num_classes:
            return None
        values = (confidence_N, uncertainty_N, torch.ones_like(confidence_N), learnt_N.double())
        sums_4C = confidence_N.new_zeros(len(BY_CLASS), self._num_classes)
        return sums_4C.index_add_(1, class_N, torch.stack(values)).reshape(-1)

    def _signals(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """c and u, float64 [N], and the group of each position, int64 [N]."""
        if self._num_classes:
            top = seen.teacher_top1()
            assert top is not None, "the teacher tells all classes"
            uncertainty_N = seen.student["entropy"].double() / math.log(seen.vocabulary)
            return top.confidence_N.double(), uncertainty_N, top.id_N
        label_logprob_N = seen.label_logprob_N.double()
        entropy_N = seen.student["entropy"].double()
        if self._section.unit == "document":
            label_logprob_N = seen.mean_by_document(label_logprob_N)
            entropy_N = seen.mean_by_document(entropy_N)
        return label_logprob_N.exp(), entropy_N / math.log(seen.vocabulary), seen.domain_N

    def confidence_thresholds(self) -> np.ndarray:
        """T of each domain or class, float64 [G]."""
        return self._thresholds("teacher_confidence", self._section.confidence)

    def uncertainty_thresholds(self) -> np.ndarray:
        """S of each domain or class, float64 [G]."""
        return self._thresholds("student_uncertainty", self._section.uncertainty)

    def mean_weight(self) -> float:
        """m."""
        value = float(self._means["mean_weight"].values[-1])
        return 1.0 if math.isnan(value) else value

    def _thresholds(self, name: str, scale: float) -> np.ndarray:
        """0 of a group, or of all, that nothing is known of."""
        *by_group, overall = self._means[name].values.tolist()
        mean_G = np.nan_to_num(by_group)
        if self._section.by == "none":
            mean_G = np.ones_like(mean_G)
        return scale * np.nan_to_num(overall) * (mean_G / (mean_G.max() or 1.0))

    def follow(self, step: StepMeans) -> None:
        """See `Weighting`."""
        mean_weight = self.mean_weight()
        for name in self.reported:
            self._means[name].follow(self._of_step(step, name))
        self._means["mean_weight"].follow(step.means("mean_weight") * mean_weight)

    def _of_step(self, step: StepMeans, name: str) -> np.ndarray:
        """The means of a step by group and over all, float64 [G + 1]; NaN without any."""
        if not self._num_classes:
            return step.means(name)
        sums_4C = step.policy_F.reshape(len(BY_CLASS), -1)
        sums_C, rows_C = sums_4C[BY_CLASS.index(name)], sums_4C[BY_CLASS.index("rows")]
        with np.errstate(invalid="ignore"):
            return np.append(sums_C, sums_C.sum()) / np.append(rows_C, rows_C.sum())

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {name: means.state() for name, means in self._means.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        for name, means in self._means.items():
            means.restore(state[name])

"""Instance weights with an annealed steepness (arXiv 2405.08019).

Its authors call it AdaKD, as others call the method of `token_temperature`. A document that is easy
for the teacher is learnt from it, a hard one from its labels: with x the teacher's mean NLL on it,

    a = exp(-1 / sqrt(d)),   d = exp(-k (x - t))

is what it counts in losses that ask the teacher, and 1 - a what it counts in the cross-entropy with
the text. k falls on a line from `steepness` to `final_steepness`, where it is 0: then a is 1/e for
all. t is a number; or a statistic of all training documents, found in one pass before the first
step as in the paper; or the running mean of x over the tokens of the steps before, and at the first
step x itself, so that a is 1/e. Of single tokens, x is the NLL of each.

The paper tells no values of k.

N positions with loss of a unit
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.config.weighting import InstanceWeights
from student_trainer.weighing.weigher import Look
from student_trainer.weighing.weighting import PositionWeights, RunningMeans, Seen, StepMeans


def instance_weight(nll_N: Tensor, *, centre: Tensor | float, steepness: float) -> Tensor:
    """a of each NLL, from 0 to 1, [N]."""
    return (-(steepness * (nll_N - centre) / 2).exp()).exp()


class AnnealedWeights:
    """The policy of a run of `steps` with its running mean; satisfies `Weighting`."""

    reported: ClassVar[tuple[str, ...]] = ("teacher_nll",)
    looks: ClassVar[frozenset[Look]] = frozenset()
    way_out: ClassVar[str] = "lower weighting.steepness, or add a cross_entropy to losses"

    def __init__(
        self,
        section: InstanceWeights,
        *,
        num_domains: int,
        steps: int,
        scored_centre: float | None = None,
    ) -> None:
        self._section, self._steps, self._scored_centre = section, steps, scored_centre
        self._means = RunningMeans(section.decay, num_domains=num_domains)
        self._step = 0

    def weights(self, seen: Seen) -> PositionWeights:
        """a, and 1 - a in the cross-entropy with the text."""
        nll_N = -seen.label_logprob_N.double()
        if self._section.unit == "document":
            nll_N = seen.mean_by_document(nll_N)
        centre = self.centre
        known = nll_N if centre is None else torch.full_like(nll_N, centre)
        weight_N = instance_weight(nll_N, centre=known, steepness=self.steepness)
        return PositionWeights(weight_N, 1 - weight_N, {"teacher_nll": nll_N})

    @property
    def steepness(self) -> float:
        """k."""
        first, last = self._section.steepness, self._section.final_steepness
        return first + (last - first) * min(1.0, self._step / max(1, self._steps - 1))

    @property
    def centre(self) -> float | None:
        """t; None before anything is known of it."""
        if self._section.scored_centre is not None:
            assert self._scored_centre is not None, "the plan of a run has it"
            return self._scored_centre
        if not isinstance(self._section.centre, str):
            return self._section.centre
        mean = float(self._means.values[-1])
        return None if math.isnan(mean) else mean

    def follow(self, step: StepMeans) -> None:
        """See `Weighting`."""
        self._means.follow(step.means("teacher_nll"))
        self._step = step.step

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"teacher_nll": self._means.state(), "step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self._means.restore(state["teacher_nll"])
        self._step = state["step"]

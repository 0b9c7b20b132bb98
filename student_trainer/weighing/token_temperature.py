"""The level of temperature of each token of a step (arXiv 2510.11615), and what it counts.

N tokens   M those that are learnt
"""

from dataclasses import dataclass

import numpy as np

from shared.config.losses import TokenTemperature
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView


@dataclass(frozen=True, slots=True)
class StepDistances:
    """What decides of a token by its Hellinger distance: learnt from `least` on, cold above the
    `median` of those that are."""

    least: float
    median: float
    weight: float  # of a token that is learnt: all tokens over those learnt

    @staticmethod
    def of(distance_N: np.ndarray, *, hardest: float) -> "StepDistances":
        """From all tokens of a step; the share `hardest` of them, ties with the last one too, is
        learnt. The median is an element, the lower one of two."""
        if not len(distance_N):
            return StepDistances(0.0, 0.0, 1.0)
        ascending_N = np.sort(distance_N)
        # 1e-9: 0.7 of 10 are to be 7.
        learnt = max(1, int(np.ceil(hardest * len(distance_N) - 1e-9)))
        least = float(ascending_N[-learnt])
        learnt_M = ascending_N[np.searchsorted(ascending_N, least) :]
        weight = len(distance_N) / len(learnt_M)
        return StepDistances(least, float(learnt_M[(len(learnt_M) - 1) // 2]), weight)

    def columns(self, distance_N: np.ndarray, *, levels: int) -> Columns:
        """`level_N`, int64, the index of the temperature, and `level_weight_N`, float32, of some of
        the tokens; level 0 is the coldest, of the hardest tokens."""
        with np.errstate(divide="ignore", invalid="ignore"):
            hardness_N = np.tanh(np.log(distance_N.astype(np.float64) / self.median))
        # a token at 0 where the median is 0; or its distance is none
        hardness_N = np.nan_to_num(hardness_N, nan=0.0)
        level_N = np.rint((1 - hardness_N) / 2 * (levels - 1)).astype(np.int64)
        # A distance that is no number counts, so that its loss ends the run.
        weight_N = np.where(distance_N < self.least, 0.0, self.weight).astype(np.float32)
        return {"level_N": level_N, "level_weight_N": weight_N}


@dataclass(frozen=True, slots=True)
class TokenTemperatures:
    """The weigher of `token_temperature`."""

    term: TokenTemperature

    @property
    def looks(self) -> frozenset[Look]:
        """How far the student is from its teacher."""
        return frozenset({"hellinger"})

    def weigh(self, step: StepView) -> list[Columns]:
        """`level_N` and `level_weight_N` of each unit."""
        found = StepDistances.of(step.whole(_distance), hardest=self.term.hardest)
        return [found.columns(_distance(unit), levels=self.term.levels) for unit in step.units]


def _distance(unit: UnitView) -> np.ndarray:
    return unit.student["hellinger"]

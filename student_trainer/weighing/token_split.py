"""Which tokens of a step are hard for ATKD, and what each class counts (arXiv 2402.11890).

N tokens   H hard ones
"""

import math
from dataclasses import dataclass

import numpy as np

from shared.config.losses import ATKD
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Hard are tokens whose label log-probability is at most `threshold`, easy the others."""

    threshold: float
    num_hard: int
    num_easy: int

    @staticmethod
    def of(label_logprob_N: np.ndarray, *, hard_fraction: float) -> "TokenSplit":
        """Split at the (1 - k) quantile of the uncertainty 1 - p_g.

        The quantile is the element below where it falls between two: the lower median for
        k = 0.5. Ties are hard. With k = 0 nothing is hard.
        """
        count = len(label_logprob_N)
        if count == 0 or hard_fraction == 0:
            return TokenSplit(-math.inf, 0, count)
        # 1e-9: (1 - 0.7) * 10 is to be 3.
        place = math.floor((1 - hard_fraction) * (count - 1) + 1e-9)
        threshold = float(np.sort(label_logprob_N)[::-1][place])
        num_hard = int((label_logprob_N <= threshold).sum())
        return TokenSplit(threshold, num_hard, count - num_hard)

    def columns(self, label_logprob_N: np.ndarray, term: ATKD) -> Columns:
        """`hard_N`, bool, and `class_weight_N`, float32, of some of the tokens.

        A weight is lambda N / (number of easy tokens), or (1 - lambda) N / (number of hard ones),
        so that the mean over the N tokens is lambda mean_easy + (1 - lambda) mean_hard.
        """
        num_tokens = self.num_hard + self.num_easy
        easy = term.easy_weight * num_tokens / max(1, self.num_easy)
        hard = (1 - term.easy_weight) * num_tokens / max(1, self.num_hard)
        hard_N = label_logprob_N <= self.threshold
        weights = np.array([easy, hard], np.float32)
        return {"hard_N": hard_N, "class_weight_N": weights[hard_N.astype(np.int64)]}


@dataclass(frozen=True, slots=True)
class ClassWeights:
    """ATKD's weigher: the step's tokens split by the label's log-probability, the teacher's or, in
    reverse, the student's."""

    term: ATKD

    @property
    def looks(self) -> frozenset[Look]:
        """The student's log-probabilities of the labels, in reverse."""
        return frozenset({"label_logprob"} if self.term.direction == "reverse" else ())

    def weigh(self, step: StepView) -> list[Columns]:
        """`hard_N` and `class_weight_N` of each unit."""
        split = TokenSplit.of(
            step.whole(self._label_logprob), hard_fraction=self.term.hard_fraction
        )
        return [split.columns(self._label_logprob(unit), self.term) for unit in step.units]

    def _label_logprob(self, unit: UnitView) -> np.ndarray:
        if self.term.direction == "reverse":
            return unit.student["label_logprob"]
        return unit.of_teacher("label_logprob")

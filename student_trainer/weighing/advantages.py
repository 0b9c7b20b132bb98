"""Advantages of tokens that the student wrote, from the rewards of their text.

The reward of a token is r = log p - log q, nats: the teacher's log-probability less the student's
when it wrote it.

N positions with loss of a unit   T tokens of a text   U units of a rank
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.config.losses import PolicyGradient
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView

WHITEN_EPS = 1e-8  # added to a variance, as the published code has it


def advantages(reward_T: np.ndarray, *, credit: str, discount: float) -> np.ndarray:
    """The advantage of each token of a text from its rewards, float64 [T].

    `token`: r_t. `return`: G_t = sum of discount^(s - t) r_s over s >= t. `later_mean`: the mean of
    r_s over s > t, 0 for the last (MiniLLM, arXiv 2306.08543, Eq. 6). `remaining_mean`: G_t over
    the T - t tokens left (its published code). `discounted_mean`: G_t over the sum of discounts, as
    in TRL. A constant reward c gives c under the means, but for the last of `later_mean`.
    """
    reward_T = np.asarray(reward_T, np.float64)
    if credit == "token":
        return reward_T
    left_T = np.arange(len(reward_T), 0, -1)
    if credit == "later_mean":
        later_T = np.append(_discounted(reward_T, 1.0)[1:], 0.0)[: len(reward_T)]
        return np.where(left_T > 1, later_T / np.maximum(1, left_T - 1), 0.0)
    return_T = _discounted(reward_T, discount)
    if credit == "return":
        return return_T
    if credit == "remaining_mean":
        return return_T / left_T
    assert credit == "discounted_mean", credit
    return return_T / _discounted(np.ones_like(reward_T), discount)


def _discounted(value_T: np.ndarray, discount: float) -> np.ndarray:
    """Each value and those after it, less by the discount for every token in between."""
    found_T, after = np.zeros_like(value_T), 0.0
    for t in range(len(value_T) - 1, -1, -1):
        after = value_T[t] + discount * after
        found_T[t] = after
    return found_T


def whitened(
    units: Sequence[np.ndarray],
    written: Sequence[np.ndarray],
    *,
    gather: Callable[[np.ndarray], list[np.ndarray]],
) -> list[np.ndarray]:
    """Advantages of a rank's units, those of unit m over all ranks with mean 0 and variance 1 where
    the student wrote, float32 [N]; all ranks call it together, with as many units.

    The published code takes padding into mean and variance, too.
    """
    chosen = [
        value_N[mask_N].astype(np.float64) for value_N, mask_N in zip(units, written, strict=True)
    ]
    own_U3 = np.array([[len(own_n), own_n.sum(), (own_n**2).sum()] for own_n in chosen])
    count_U, sum_U, square_U = np.sum(gather(own_U3), axis=0).T
    mean_U = sum_U / np.maximum(1, count_U)
    variance_U = np.maximum(0, square_U / np.maximum(1, count_U) - mean_U**2)
    scaled = zip(units, written, mean_U, np.sqrt(variance_U + WHITEN_EPS), strict=True)
    return [
        np.where(mask_N, (value_N - mean) / deviation, 0.0).astype(np.float32)
        for value_N, mask_N, mean, deviation in scaled
    ]


def written_by_student(unit: UnitView) -> np.ndarray:
    """Which positions hold what the student wrote, bool [N]."""
    version_R = unit.rows.versions()
    assert version_R is not None, "the config has the student write"
    return version_R[unit.layout.row_N] >= 0


@dataclass(frozen=True, slots=True)
class Advantages:
    """The weigher of `policy_gradient`."""

    term: PolicyGradient

    @property
    def looks(self) -> frozenset[Look]:
        """Nothing: the student's log-probabilities are kept from when it wrote."""
        return frozenset()

    def weigh(self, step: StepView) -> list[Columns]:
        """`advantage_N` of each unit, float32, 0 where the student did not write."""
        found = [self._of(unit) for unit in step.units]
        if self.term.whiten:
            written = [written_by_student(unit) for unit in step.units]
            found = whitened(found, written, gather=step.gather)
        return [{"advantage_N": advantage_N} for advantage_N in found]

    def _of(self, unit: UnitView) -> np.ndarray:
        layout, written_N = unit.layout, written_by_student(unit)
        reward_N = unit.of_teacher("label_logprob") - unit.rows.own_logprobs()
        advantage_N = np.zeros(len(reward_N), np.float32)
        for document in np.unique(layout.document_N[written_N]):
            own = np.flatnonzero(layout.document_N == document)
            advantage_N[own] = advantages(
                reward_N[own], credit=self.term.credit, discount=self.term.discount
            )
        return advantage_N

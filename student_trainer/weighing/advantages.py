"""Advantages of tokens that the student wrote, from the rewards of their text.

The reward of a token is r = log p - log q, nats: the teacher's log-probability less that with which
the student drew it.

N positions with loss of a unit   T tokens of a text
"""

from dataclasses import dataclass

import numpy as np

from shared.config.losses import PolicyGradient
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView


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
        return [{"advantage_N": self._of(unit)} for unit in step.units]

    def _of(self, unit: UnitView) -> np.ndarray:
        layout, version_R = unit.layout, unit.rows.versions()
        assert version_R is not None, "the config has the student write"
        reward_N = unit.of_teacher("label_logprob") - unit.rows.behaviour()
        advantage_N = np.zeros(len(reward_N), np.float32)
        written_N = version_R[layout.row_N] >= 0
        for document in np.unique(layout.document_N[written_N]):
            own = np.flatnonzero(layout.document_N == document)
            advantage_N[own] = advantages(
                reward_N[own], credit=self.term.credit, discount=self.term.discount
            )
        return advantage_N

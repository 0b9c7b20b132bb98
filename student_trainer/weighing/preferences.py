"""Preferences of a step: the loss of each pair of responses, and its slope in each of them.

Documents of a unit are pairs, the chosen response before the rejected one.

N positions with loss of a unit   P pairs, of a unit or of a step   2 the chosen and the rejected
"""

from dataclasses import dataclass

import numpy as np

from shared.config.adaptive_losses import Preference
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView


def pair_losses(
    ratio_P2: np.ndarray, *, kl_2: np.ndarray, objective: str, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each pair [P] and its slope in both log-probabilities [P, 2], float64, from the
    student's less the teacher's log-probabilities of responses, nats. `kl_2` are the means of a
    step, not below 0, which kto_pair takes as they are."""
    chosen_P, rejected_P = ratio_P2.T
    if objective == "dpo":
        margin_P = beta * (chosen_P - rejected_P)
        slope_P = -beta * _logistic(-margin_P)
        return np.logaddexp(0.0, -margin_P), np.stack([slope_P, -slope_P], axis=1)
    assert objective == "kto_pair", objective
    good_P = _logistic(beta * (chosen_P - kl_2[1]))
    bad_P = _logistic(beta * (kl_2[0] - rejected_P))
    slopes = (-beta * good_P * (1 - good_P) / 2, beta * bad_P * (1 - bad_P) / 2)
    return 1 - (good_P + bad_P) / 2, np.stack(slopes, axis=1)


@dataclass(frozen=True, slots=True)
class PairLosses:
    """The weigher of `preference`."""

    term: Preference

    @property
    def looks(self) -> frozenset[Look]:
        """The student's log-probabilities of whole responses, before it learns."""
        return frozenset(("label_logprob",))

    def weigh(self, step: StepView) -> list[Columns]:
        """`preference_N` and `preference_slope_N` of each unit, float32. Both are times tokens over
        pairs of the step, so that its mean over tokens is that over pairs."""
        ratios = [_ratios(unit) for unit in step.units]
        whole_P2 = np.concatenate(step.gather(np.concatenate(ratios)))
        tokens = sum(len(unit.layout.label_N) for unit in step.units)
        scale = np.sum(step.gather(np.array(tokens))) / max(1, len(whole_P2))
        kl_2 = np.maximum(0.0, whole_P2.mean(0)) if len(whole_P2) else np.zeros(2)
        return [
            self._columns(unit, ratio_P2, kl_2=kl_2, scale=float(scale))
            for unit, ratio_P2 in zip(step.units, ratios, strict=True)
        ]

    def _columns(
        self, unit: UnitView, ratio_P2: np.ndarray, *, kl_2: np.ndarray, scale: float
    ) -> Columns:
        asked = {"objective": self.term.objective, "beta": self.term.beta}
        loss_P, slope_P2 = pair_losses(ratio_P2, kl_2=kl_2, **asked)
        document_N = unit.layout.document_N
        positions_P = np.bincount(document_N // 2, minlength=len(loss_P))
        share_P = scale * loss_P / np.maximum(1, positions_P)
        slope_N = scale * slope_P2.ravel()[document_N]
        return {
            "preference_N": share_P[document_N // 2].astype(np.float32),
            "preference_slope_N": slope_N.astype(np.float32),
        }


def _ratios(unit: UnitView) -> np.ndarray:
    """The student's less the teacher's log-probability of each response [P, 2], float64 nats."""
    num_documents = sum(map(len, unit.rows.column("doc_starts")))
    ratio_N = unit.student["label_logprob"].astype(np.float64) - unit.of_teacher("label_logprob")
    sums = np.bincount(unit.layout.document_N, weights=ratio_N, minlength=num_documents)
    return sums.reshape(-1, 2)


def _logistic(value: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -value))

"""Points of the simplex: from logits, and the nearest one within bounds.

D domains in config order   B breakpoints
"""

import numpy as np


def softmax(logit_D: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x), safe for any finite x; -inf gets nothing."""
    mass_D = np.exp(logit_D - logit_D.max())
    return mass_D / mass_D.sum()


def projected(weight_D: np.ndarray, low_D: np.ndarray, high_D: np.ndarray) -> np.ndarray:
    """The point nearest to `weight_D` with sum 1 and low <= w <= high; itself where it is one.

    It is clip(w - shift, low, high) for the one shift that makes the sum 1, found exactly: the sum
    is piecewise linear in the shift. Some such point must exist.
    """
    inside = (low_D <= weight_D) & (weight_D <= high_D)
    if inside.all():
        return weight_D
    break_B = np.sort(np.concatenate([weight_D - low_D, weight_D - high_D]))
    first, last = 0, len(break_B) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if np.clip(weight_D - break_B[middle], low_D, high_D).sum() >= 1:
            first = middle
        else:
            last = middle
    trial_D = weight_D - (break_B[first] + break_B[last]) / 2
    free_D = (low_D < trial_D) & (trial_D < high_D)
    shift = break_B[first]
    if free_D.any():
        bound = np.clip(trial_D, low_D, high_D)[~free_D].sum()
        shift = (weight_D[free_D].sum() + bound - 1) / free_D.sum()
    return np.clip(weight_D - shift, low_D, high_D)

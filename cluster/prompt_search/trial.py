"""Candidates and trials: a prompt, how it came about, and how it did on every example.

E examples of a split
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.prompts.prompts import Prompt

# Values per example [E] of each prompt, None for one that does not fit the teacher's context.
Score = Callable[[Sequence[Prompt]], list[np.ndarray | None]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt to be tried."""

    prompt: Prompt
    origin: str  # how it came about, for people
    parent: str | None = None  # id of the prompt it was made from


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over examples and its standard error."""

    mean: float
    se: float

    @staticmethod
    def of(values_E: np.ndarray) -> "Estimate":
        """From one value per example; a single example has no error that is known."""
        count = len(values_E)
        se = float(values_E.std(ddof=1)) / count**0.5 if count > 1 else float("inf")
        return Estimate(float(values_E.mean()), se)

    def above(self, errors: float = 1.0) -> float:
        """The lower confidence bound, some standard errors below the mean."""
        return self.mean - errors * self.se


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate on the development set; no values where it does not fit."""

    candidate: Candidate
    round: int
    values_E: np.ndarray | None

    @property
    def estimate(self) -> Estimate | None:
        """Its score, None where it does not fit."""
        return None if self.values_E is None else Estimate.of(self.values_E)

    def line(self) -> dict[str, Any]:
        """The trial in the history of prompts.json."""
        estimate = self.estimate
        return self.candidate.prompt.entry() | {
            "round": self.round,
            "origin": self.candidate.origin,
            "parent": self.candidate.parent,
            "fits": estimate is not None,
            "dev_mean": estimate.mean if estimate else None,
            "dev_se": estimate.se if estimate else None,
        }

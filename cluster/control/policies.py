"""Policies: rules that turn reports about the student into domain weights.

A policy is pure: what it must remember between decisions is the `factors` of the entry before.
A new policy is one class, one line in `POLICIES` and one section in `shared.config.mixture`.
Floors and caps act on the weights of all policies alike, in `limited`.

D domains in config order
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.config.mixture import (
    AdaptiveMixture,
    DDKMixture,
    DoReMiMixture,
    FixedMixture,
    Mixture,
    ODMMixture,
    ShearedMixture,
)
from shared.mixture.ddk import initial_factors, updated_factors
from shared.mixture.domain_policies import (
    excess_losses,
    exp3_weights,
    loss_differences,
    raised_weights,
    smoothed_rewards,
)
from shared.mixture.simplex import projected
from shared.mixture.weight_log import DomainReport, WeightEntry, WeightLog

Weights = tuple[float, ...]  # shares of loss tokens in config order, sum 1


@dataclass(frozen=True, slots=True)
class Decision:
    """Weights, and the state from which the policy decides next."""

    weights: Weights
    factors: tuple[float, ...] | None = None


class Policy(Protocol):
    """What the controller needs of a rule."""

    def opening(self) -> Decision | None:
        """Entry 0 where it needs no report, else None."""
        ...

    def first(self, report: DomainReport) -> Decision:
        """Entry 0 from the report of the untrained student."""
        ...

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """The entry after those of `log`, which has some."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Weights that never change."""

    mixture: FixedMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        """The configured weights, normalised."""
        return Decision(self.mixture.shares(dict(zip(self.domains, self.natural, strict=True))))

    def first(self, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()


@dataclass(frozen=True, slots=True)
class DDKPolicy:
    """Algorithm 1 of DDK (arXiv 2407.16154): more from where the student lags the teacher most."""

    mixture: DDKMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> None:
        """r^0 needs the untrained student's perplexities."""
        return

    def first(self, report: DomainReport) -> Decision:
        """r^0 by Eq. 1; `start` decides whether it or natural proportions rule interval 0."""
        r = initial_factors(report, domains=self.domains)
        weights = r if self.mixture.start == "ddk" else _normalised(self.natural)
        return Decision(weights, factors=r)

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """r^{t+1} from r^t by Eq. 2."""
        before = log.entries[-1].factors
        assert before is not None, "a DDK entry keeps its factors"
        alpha = self.mixture.alpha
        r = updated_factors(before, report, alpha=alpha, domains=self.domains)
        return Decision(r, factors=r)


@dataclass(frozen=True, slots=True)
class DoReMiPolicy:
    """More of the domains whose training text the student knows less well than the teacher.

    Its factors are the last excess losses, for domains that are not seen in an interval.
    """

    mixture: DoReMiMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        """Uniform."""
        count = len(self.domains)
        return Decision((1 / count,) * count, factors=(0.0,) * count)

    def first(self, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """The weights before, raised by excess loss."""
        previous = log.entries[-1]
        excess_D = excess_losses(report, _remembered(previous))
        weight_D = _raised(previous, excess_D, self.mixture)
        return Decision(tuple(weight_D.tolist()), factors=tuple(excess_D.tolist()))


@dataclass(frozen=True, slots=True)
class ShearedPolicy:
    """More of the domains whose validation loss is furthest above the teacher's."""

    mixture: ShearedMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        """Natural proportions."""
        return Decision(_normalised(self.natural))

    def first(self, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """The weights before, raised by the distance to the teacher."""
        difference_D = loss_differences(report, domains=self.domains)
        return Decision(tuple(_raised(log.entries[-1], difference_D, self.mixture).tolist()))


@dataclass(frozen=True, slots=True)
class ODMPolicy:
    """A bandit that plays the domains whose training text has the largest KL.

    A reward is divided by the mean of the weights that the blocks since the report before were
    drawn with, of which the first `lag_steps` were drawn under the entry before the last. A block
    counts as one, whatever its loss tokens. Its factors are the smoothed rewards R.
    """

    mixture: ODMMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        """Uniform, with nothing earned."""
        reward_D = np.zeros(len(self.domains))
        weight_D = exp3_weights(reward_D, decision=0)
        return Decision(tuple(weight_D.tolist()), factors=tuple(reward_D.tolist()))

    def first(self, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()

    def next(self, log: WeightLog, report: DomainReport) -> Decision:
        """By the rewards so far; t is the index of the decision."""
        previous = log.entries[-1]
        drawn_D = log.mean_weights(range(previous.decided_at, report.step))
        reward_D = smoothed_rewards(
            _remembered(previous),
            report,
            weight_D=np.array(drawn_D),
            smoothing=self.mixture.smoothing,
        )
        weight_D = exp3_weights(reward_D, decision=previous.index + 1)
        return Decision(tuple(weight_D.tolist()), factors=tuple(reward_D.tolist()))


POLICIES = {
    "fixed": FixedPolicy,
    "ddk": DDKPolicy,
    "doremi": DoReMiPolicy,
    "sheared": ShearedPolicy,
    "odm": ODMPolicy,
}


def policy_for(mixture: Mixture, *, domains: tuple[str, ...], natural: Weights) -> Policy:
    """The policy a config asks for. `natural`: each domain's share of the corpus's loss tokens."""
    return POLICIES[mixture.policy](mixture, domains, natural)


def limited(weights: Weights, mixture: Mixture, *, previous: WeightEntry | None) -> Weights:
    """The nearest weights that keep the floor and, after an entry, the cap on each change."""
    if not isinstance(mixture, AdaptiveMixture):
        return weights
    low_D = np.full(len(weights), mixture.floor)
    high_D = np.ones(len(weights))
    if previous is not None:
        before_D = np.array(previous.weights)
        low_D = np.maximum(low_D, before_D - mixture.max_change)
        high_D = np.minimum(high_D, before_D + mixture.max_change)
    return tuple(projected(np.array(weights), low_D, high_D).tolist())


def _remembered(previous: WeightEntry) -> np.ndarray:
    assert previous.factors is not None, "every entry of this policy keeps its factors"
    return np.array(previous.factors)


def _raised(
    previous: WeightEntry, loss_D: np.ndarray, mixture: DoReMiMixture | ShearedMixture
) -> np.ndarray:
    return raised_weights(
        np.array(previous.weights),
        loss_D,
        step_size=mixture.step_size,
        smoothing=mixture.smoothing,
    )


def _normalised(weights: Weights) -> Weights:
    total = sum(weights)
    return tuple(weight / total for weight in weights)

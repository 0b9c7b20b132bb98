"""Policies: rules that turn validation reports into domain weights.

A policy is pure: what it must remember between decisions is the `factors` of the entry before.
A new policy is one class, one line in `POLICIES` and one section in `shared.config`.
"""

from dataclasses import dataclass
from typing import Protocol

from shared.config_mixture import DDKMixture, FixedMixture, Mixture
from shared.ddk import initial_factors, updated_factors
from shared.domains import DomainReport, WeightEntry

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

    def next(self, previous: WeightEntry, report: DomainReport) -> Decision:
        """The entry after `previous`."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Weights that never change."""

    mixture: FixedMixture
    domains: tuple[str, ...]
    natural: Weights

    def opening(self) -> Decision:
        """The configured weights, normalised."""
        asked = self.mixture.weights
        if asked == "natural":
            return Decision(_normalised(self.natural))
        if asked == "uniform":
            return Decision(_normalised((1.0,) * len(self.domains)))
        return Decision(_normalised(tuple(asked[name] for name in self.domains)))

    def first(self, report: DomainReport) -> Decision:
        """The same, whatever the report."""
        return self.opening()

    def next(self, previous: WeightEntry, report: DomainReport) -> Decision:
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

    def next(self, previous: WeightEntry, report: DomainReport) -> Decision:
        """r^{t+1} from r^t by Eq. 2."""
        assert previous.factors is not None, "a DDK entry keeps its factors"
        alpha = self.mixture.alpha
        r = updated_factors(previous.factors, report, alpha=alpha, domains=self.domains)
        return Decision(r, factors=r)


POLICIES = {"fixed": FixedPolicy, "ddk": DDKPolicy}


def policy_for(mixture: Mixture, *, domains: tuple[str, ...], natural: Weights) -> Policy:
    """The policy a config asks for. `natural`: each domain's share of the corpus's loss tokens."""
    return POLICIES[mixture.policy](mixture, domains, natural)


def _normalised(weights: Weights) -> Weights:
    total = sum(weights)
    return tuple(weight / total for weight in weights)

"""Which domains the student sees how much of."""

import math
from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shared.config.base import Fraction, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]
# At 1000 a domain ahead by 0.05 nats already takes all but the smoothing, and no product with a
# loss overflows.
StepSize = Annotated[float, Field(gt=0, le=1000)]


class FixedMixture(Section):
    """Domain weights that never change: shares of loss tokens."""

    needs_validation: ClassVar[bool] = False
    opens_with_report: ClassVar[bool] = False
    lag_steps: ClassVar[int] = 2  # of a change of phase

    policy: Literal["fixed"] = "fixed"
    weights: Literal["natural", "uniform"] | dict[str, float] = "natural"

    def shares(self, natural: Mapping[str, float]) -> tuple[float, ...]:
        """Of loss tokens, sum 1, in the order of the domains' `natural` weights."""
        match self.weights:
            case "natural":
                asked = natural
            case "uniform":
                asked = dict.fromkeys(natural, 1.0)
            case asked:
                pass
        total = sum(asked[name] for name in natural)
        return tuple(asked[name] / total for name in natural)


class AdaptiveMixture(Section):
    """What all policies share that move weights while the student learns."""

    needs_validation: ClassVar[bool] = True  # decides from validation text, not training text
    opens_with_report: ClassVar[bool] = False  # entry 0 needs the untrained student's report

    interval: int = Field(ge=1, description="K: steps between decisions")
    lag_steps: int = Field(
        default=2, ge=0, description="steps from a decision to the first block it rules"
    )
    floor: Fraction = Field(default=0.0, description="least weight of a domain")
    max_change: Share = Field(default=1.0, description="most a weight moves in one decision")
    deadline_s: Positive = 600.0

    @model_validator(mode="after")
    def _interval_covers_lag(self) -> Self:
        if self.interval < self.lag_steps:
            raise ValueError(
                f"mixture.interval is {self.interval}, below mixture.lag_steps {self.lag_steps}; "
                "raise the interval or lower the lag"
            )
        return self


class DDKMixture(AdaptiveMixture):
    """From the ratio of perplexities on validation text (DDK, arXiv 2407.16154, Eq. 1 and 2)."""

    opens_with_report: ClassVar[bool] = True

    policy: Literal["ddk"] = "ddk"
    interval: int = Field(default=1000, ge=1, description="K: steps between decisions")
    alpha: Fraction = 0.5
    start: Literal["natural", "ddk"] = Field(default="natural", description="weights of interval 0")
    stop_ratio: float | None = Field(
        default=None,
        ge=1,
        description="end training once the student's validation perplexity is at most this many "
        "times the teacher's in every domain",
    )


class DoReMiMixture(AdaptiveMixture):
    """From the student's excess loss over the teacher's on training text (DoReMi, arXiv
    2305.10429, Algorithm 1, with the teacher as reference).

    The paper decides at every step; an interval takes the mean over the tokens of its steps.
    """

    needs_validation: ClassVar[bool] = False

    policy: Literal["doremi"] = "doremi"
    interval: int = Field(default=10, ge=1, description="steps between decisions")
    step_size: StepSize = Field(default=1.0, description="eta")
    smoothing: Share = Field(default=1e-4, description="c: share of the uniform distribution")


class ShearedMixture(AdaptiveMixture):
    """From the distance to the teacher's loss on validation text (Sheared LLaMA, arXiv 2310.06694,
    dynamic batch loading, with the teacher's loss as target)."""

    policy: Literal["sheared"] = "sheared"
    interval: int = Field(default=50, ge=1, description="m: steps between decisions")
    step_size: StepSize = Field(default=1.0, description="eta")
    smoothing: Share = Field(default=1e-4, description="c: share of the uniform distribution")


class ODMMixture(AdaptiveMixture):
    """Exp3 with the KL of training text as reward (online data mixing, arXiv 2312.02406,
    Algorithm 1).

    The paper decides at every step; an interval takes the mean over the tokens of its steps.
    """

    needs_validation: ClassVar[bool] = False

    policy: Literal["odm"] = "odm"
    interval: int = Field(default=10, ge=1, description="steps between decisions")
    smoothing: Fraction = Field(default=0.9, description="xi: weight of the rewards before")


Mixture = Annotated[
    FixedMixture | DDKMixture | DoReMiMixture | ShearedMixture | ODMMixture,
    Field(discriminator="policy"),
]


def check_mixture(mixture: Mixture, *, domains: Collection[str]) -> None:
    """Raise ValueError where a policy cannot work in this config."""
    if isinstance(mixture, FixedMixture):
        if isinstance(mixture.weights, dict):
            _check_weights(mixture.weights, domains)
        return
    num_domains = len(domains)
    if mixture.floor * num_domains > 1:
        raise ValueError(
            f"mixture.floor is {mixture.floor:g} for each of {num_domains} domains, more than 1 in "
            f"all; lower it to {1 / num_domains:.3g} or less"
        )


def _check_weights(weights: Mapping[str, float], domains: Collection[str]) -> None:
    if set(weights) != set(domains):
        odd = sorted(set(weights) ^ set(domains))
        raise ValueError(f"mixture.weights must name every domain once; {', '.join(odd)} differ")
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        raise ValueError(
            f"mixture.weights must be non-negative with a positive, finite sum, not {weights}"
        )

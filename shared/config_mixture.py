"""Which domains the student sees how much of."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config_base import Fraction, Positive, Section


class FixedMixture(Section):
    """Domain weights that never change: shares of loss tokens."""

    policy: Literal["fixed"] = "fixed"
    weights: Literal["natural", "uniform"] | dict[str, float] = "natural"


class AdaptiveMixture(Section):
    """What all policies share that move weights while the student learns."""

    interval: int = Field(ge=1, description="K: steps between decisions")
    lag_steps: int = Field(
        default=2, ge=0, description="steps from a decision to the first block it rules"
    )
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

    policy: Literal["ddk"] = "ddk"
    interval: int = Field(default=1000, ge=1, description="K: steps between decisions")
    alpha: Fraction = 0.5
    start: Literal["natural", "ddk"] = Field(default="natural", description="weights of interval 0")


Mixture = Annotated[FixedMixture | DDKMixture, Field(discriminator="policy")]

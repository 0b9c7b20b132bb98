"""Losses in which a step decides, from how both models do on its tokens, how each is learnt."""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from shared.config.base import Fraction, LossSection, Positive


class ATKD(LossSection):
    """Token-adaptive teaching (ATKD, arXiv 2402.11890): hard tokens learn TKD + DKD, easy ones DKD.

    Defaults are the paper's. Hard are the tokens of a step where the teacher is least certain of
    the label; `reverse` swaps the roles of teacher and student, for the split too, so that the
    student reads every row once more before it learns. Temperature 1.
    """

    reads_ids: ClassVar[bool] = True
    student_weighted: ClassVar[str | None] = "direction reverse"
    single: ClassVar[str | None] = "the split is the step's"

    kind: Literal["atkd"] = "atkd"
    weight: Positive = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    hard_fraction: Fraction = Field(default=0.5, description="k: share of tokens that are hard")
    easy_weight: Fraction = Field(default=0.2, description="lambda; hard tokens get 1 - lambda")

    @property
    def weighs_by_student(self) -> bool:
        """In reverse."""
        return self.direction == "reverse"


class TokenTemperature(LossSection):
    """Token temperatures (arXiv 2510.11615, "AdaKD" to its authors, as another method is): tokens
    at which the student is far from its teacher are compared cold, near ones warm.

    Temperatures lie on `levels` from exp(-strength) to exp(strength), evenly in their logarithm;
    `student_trainer.losses.terms.token_temperature` has the equations. The student reads every row
    once more before it learns.
    """

    reads_ids: ClassVar[bool] = True
    student_weighted: ClassVar[str | None] = "divergence reverse_kl"
    single: ClassVar[str | None] = "the temperatures are the step's"

    kind: Literal["token_temperature"] = "token_temperature"
    weight: Positive = 1.0
    divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    strength: float = Field(default=0.5, gt=0, le=2, description="c: log of the largest")
    levels: int = Field(default=5, ge=3, le=33, description="temperatures; odd, 1 is among them")
    hardest: float = Field(
        default=1.0, gt=0, le=1, description="share of a step's tokens that is learnt"
    )

    @property
    def weighs_by_student(self) -> bool:
        """With the reverse KL."""
        return self.divergence == "reverse_kl"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those of the levels, the coldest first."""
        half = self.levels // 2
        logs = (self.strength * level / half for level in range(-half, half + 1))
        return tuple(round(math.exp(log), 6) for log in logs)

    @model_validator(mode="after")
    def _one_is_a_level(self) -> "TokenTemperature":
        if self.levels % 2 == 0:
            raise ValueError(
                f"the levels of token_temperature are {self.levels}; take an odd number, so that "
                "temperature 1 is one of them"
            )
        return self

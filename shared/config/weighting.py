"""What each token counts, from what teacher and student know of it: the policies that weigh."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast, get_args

from pydantic import Field

from shared.config.base import Momentum, Positive, Section
from shared.config.losses import Loss

Statistic = Literal["mean", "lower_quartile", "median", "upper_quartile"]


class Uniform(Section):
    """Every token counts alike."""

    weighs: ClassVar[bool] = False
    selects: ClassVar[bool] = False  # whether it selects among changed documents
    scored_centre: ClassVar[None] = None
    head_products: ClassVar[int] = 0  # of all positions, beside those of the loss

    policy: Literal["uniform"] = "uniform"


class WeighingPolicy(Section):
    """What all policies share that weigh by what the teacher says of the text."""

    weighs: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    head_products: ClassVar[int] = 0

    @property
    def scored_centre(self) -> Statistic | None:
        """Which statistic of the teacher's NLL of all training documents it needs; None: none."""
        return None

    decay: Momentum = Field(
        default=0.9, description="of running means, where there are any, by step"
    )


class LLKD(WeighingPolicy):
    """Learn where the teacher is confident and the student uncertain (LLKD, arXiv 2411.08028).

    `student_trainer.weighing.llkd` has the equations; both thresholds follow running means, over
    all text and by class or domain.
    """

    head_products: ClassVar[int] = 1  # for the student's entropy

    policy: Literal["llkd"] = "llkd"
    unit: Literal["token", "document"] = Field(
        default="token", description="what is learnt or left out: tokens, or whole documents"
    )
    confidence: float = Field(
        default=1.0,
        ge=0,
        description="the teacher's threshold over its running mean; 0: none",
    )
    uncertainty: float = Field(
        default=1.0,
        ge=0,
        description="the student's threshold over its running mean; 0: none",
    )
    by: Literal["auto", "class", "domain", "none"] = Field(
        default="auto",
        description="what scales both thresholds, by running means: the teacher's class (auto "
        "where rows have one), the domain (auto elsewhere), or nothing",
    )


class InstanceWeights(WeighingPolicy):
    """What is easy for the teacher is learnt from it, what is hard from the labels, less so as
    training goes on (arXiv 2405.08019; "AdaKD" to its authors, as `token_temperature` to others).

    `student_trainer.weighing.instance_weights` has the equations.
    """

    policy: Literal["instance_weights"] = "instance_weights"
    unit: Literal["document", "token"] = Field(
        default="document", description="what has a weight of its own: documents, or tokens"
    )
    steepness: float = Field(default=3.0, ge=0, description="k at the first step")
    final_steepness: float = Field(default=0.0, ge=0, description="k at the last, on a line")
    centre: Literal["running"] | Statistic | Positive = Field(
        default="running",
        description="t, nats per token of the teacher's NLL: its running mean, or a statistic of "
        "the means of all training documents, scored before the first step, or a number",
    )

    @property
    def scored_centre(self) -> Statistic | None:
        """What t is of the teacher's NLL of all training documents; None: of none."""
        is_scored = self.centre in get_args(Statistic)
        return cast(Statistic, self.centre) if is_scored else None


class ReinforcedSelection(WeighingPolicy):
    """A policy network that learns which changed documents to keep (Learning to Augment, arXiv
    2101.08106).

    `student_trainer.weighing.reinforced` has the equations; `decay` is that of the reward's running
    mean, the baseline, by looks.
    """

    selects: ClassVar[bool] = True
    head_products: ClassVar[int] = 1  # for the student's NLL

    policy: Literal["reinforced"] = "reinforced"
    start: float = Field(
        default=0.5, gt=0, le=1, description="share of changed documents kept at first; 1: always"
    )
    step_size: Positive = Field(default=1.0, description="of the policy network's update")
    every: int = Field(
        default=10, ge=1, description="steps between looks at the validation loss, the reward"
    )
    rows: int = Field(
        default=8, ge=1, description="validation rows of each domain that a look reads"
    )


Weighting = Annotated[
    Uniform | LLKD | InstanceWeights | ReinforcedSelection,
    Field(discriminator="policy"),
]


def as_unscored(weighting: Weighting) -> Weighting:
    """The same weights for a run before which no rows are scored."""
    if weighting.scored_centre is None:
        return weighting
    return weighting.model_copy(update={"centre": "running"})


def check_weighting(weighting: Weighting, losses: Sequence[Loss], *, classifies: bool) -> None:
    """Raise ValueError where a policy has nothing to weigh by, or a loss that it would bias."""
    if not weighting.weighs:
        return
    if isinstance(weighting, LLKD) and weighting.by == "class" and not classifies:
        raise ValueError(
            "weighting.by is class, but task is not classification, whose rows have one; set it to "
            "domain, none or auto"
        )
    if not any(loss.asks_teacher for loss in losses):
        raise ValueError(
            f"weighting.policy is {weighting.policy}, which reads what a teacher says of each "
            "token, but no loss asks one; add a divergence to losses, or leave weighting out"
        )
    for loss in losses:
        if loss.of_rollouts:
            raise ValueError(
                f"weighting.policy is {weighting.policy}, but losses has a {loss.kind}, whose "
                "gradient is a mean over all tokens that the student wrote; leave one of the two "
                "out"
            )

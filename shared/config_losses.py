"""Losses a config can name; each is a term in nats per token with a weight."""

from typing import Annotated, Literal

from pydantic import Field

from shared.config_base import Fraction, Positive, Section


class ForwardKL(Section):
    """KL(teacher || student) over the kept ids and the tail bucket, times temperature squared."""

    kind: Literal["forward_kl"] = "forward_kl"
    weight: Positive = 1.0
    temperature: Positive = 1.0
    times_temperature_squared: bool = True


class SoftCrossEntropy(Section):
    """-sum p log q over the kept ids and the tail bucket: forward KL plus the teacher's entropy.

    The soft-target cross-entropy of AKD (Saxena, Janzen and Maass, WiML 2024).
    """

    kind: Literal["soft_cross_entropy"] = "soft_cross_entropy"
    weight: Positive = 1.0
    temperature: Positive = 2.0
    times_temperature_squared: bool = True


class ATKD(Section):
    """Token-adaptive teaching (ATKD, arXiv 2402.11890): hard tokens learn TKD + DKD, easy ones DKD.

    Defaults are the paper's. Hard are the tokens of a step where the teacher is least certain of
    the label; `reverse` swaps the roles of teacher and student, and splits each micro-batch by
    the student's own uncertainty. Temperature 1.
    """

    kind: Literal["atkd"] = "atkd"
    weight: Positive = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    hard_fraction: Fraction = Field(default=0.5, description="k: share of tokens that are hard")
    easy_weight: Fraction = Field(default=0.2, description="lambda; hard tokens get 1 - lambda")


class CrossEntropy(Section):
    """Cross-entropy with the text's own next token."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: Positive = 1.0


class HiddenStates(Section):
    """Match hidden states of chosen teacher layers through a learned projection.

    Layer 0 is the embedding's output, layer L the last one, after the final norm.
    """

    kind: Literal["hidden_states"] = "hidden_states"
    weight: Positive = 1.0
    final_weight: float | None = Field(
        default=None,
        ge=0,
        description="weight in the last progressive phase; between, on a line",
    )
    layers: dict[int, int] = Field(min_length=1, description="teacher layer -> student layer")
    distance: Literal["mse", "cosine"] = "mse"

    def in_phase(self, phase: int, *, phases: int) -> "HiddenStates":
        """The loss as it counts in a phase of progressive distillation, counted from 0.

        AKD learns representations first and outputs later (Saxena, Janzen and Maass, WiML 2024).
        """
        if self.final_weight is None:
            return self
        share = phase / (phases - 1)
        weight = (1 - share) * self.weight + share * self.final_weight
        return self.model_copy(update={"weight": weight})


Loss = Annotated[
    ForwardKL | SoftCrossEntropy | ATKD | CrossEntropy | HiddenStates,
    Field(discriminator="kind"),
]

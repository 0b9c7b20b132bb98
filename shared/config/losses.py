"""Losses a config can name; each is a term in nats per token with a weight."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config.base import Fraction, Positive, Section


class Divergence(Section):
    """A distance of the student's distribution q from the teacher's p at one temperature.

    Over the ids the teacher shipped and one bucket for the rest; `student_trainer.losses.
    divergences` holds formulas, sources and laws of all.
    """

    # Whether ids drawn from p alone give it without bias: it is linear in p.
    takes_drawn_ids: ClassVar[bool] = False

    weight: Positive = 1.0
    temperature: Positive = 1.0
    times_temperature_squared: bool = True


class ForwardKL(Divergence):
    """KL(p || q)."""

    takes_drawn_ids: ClassVar[bool] = True

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Divergence):
    """KL(q || p)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class SoftCrossEntropy(Divergence):
    """-sum p log q: forward KL plus the teacher's entropy.

    The soft-target cross-entropy of AKD (Saxena, Janzen and Maass, WiML 2024).
    """

    takes_drawn_ids: ClassVar[bool] = True

    kind: Literal["soft_cross_entropy"] = "soft_cross_entropy"
    temperature: Positive = 2.0


class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    beta 0 is forward KL and 1 is reverse KL. Between, the value and its gradient tend to 0 towards
    both; `continuous` divides by beta (1 - beta), so that they tend to those two instead.
    """

    kind: Literal["jsd"] = "jsd"
    beta: Fraction = 0.5
    continuous: bool = False

    @model_validator(mode="after")
    def _beta_is_told_from_its_ends(self) -> "JSD":
        if self.continuous and self.beta not in (0, 1) and not 1e-3 <= self.beta <= 1 - 1e-3:
            raise ValueError(
                f"the beta of jsd is {self.beta}; with continuous, float32 cannot tell it from "
                f"{round(self.beta)}, so take that, or a value from 0.001 to 0.999"
            )
        return self


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898)."""

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)


class SkewReverseKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898)."""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)


class TotalVariation(Divergence):
    """Half the sum of |p - q|."""

    kind: Literal["total_variation"] = "total_variation"


class AKL(Divergence):
    """Forward and reverse KL, weighted by the gaps in the teacher's head and tail.

    (arXiv 2404.02657.)
    """

    kind: Literal["akl"] = "akl"
    mu: Fraction = Field(default=0.5, description="teacher mass of the head")


class GeneralisedKL(Divergence):
    """sum p log(p / q) - p + q over the kept ids alone; in reverse p and q swapped."""

    kind: Literal["generalised_kl"] = "generalised_kl"
    direction: Literal["forward", "reverse"] = "forward"


class TAID(Divergence):
    """Cross-entropy with t p + (1 - t) q, where t grows as the loss falls (arXiv 2501.16937).

    q carries no gradient in the target. Probabilities are mixed, where the published code mixes
    logits. Defaults are the published code's; the paper takes t_start 0.2 for Llama-2.
    """

    kind: Literal["taid"] = "taid"
    t_start: Fraction = 0.4
    t_end: Fraction = 1.0
    alpha: Fraction = Field(default=5e-4, description="largest step of t; 0: t on a line")
    beta: Fraction = Field(default=0.99, description="momentum of the loss's relative change")

    @model_validator(mode="after")
    def _t_does_not_fall(self) -> "TAID":
        if self.t_start > self.t_end:
            raise ValueError(
                f"the t_start of taid is {self.t_start}, above its t_end {self.t_end}; t only grows"
            )
        return self


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
    ForwardKL
    | ReverseKL
    | SoftCrossEntropy
    | JSD
    | SkewForwardKL
    | SkewReverseKL
    | TotalVariation
    | AKL
    | GeneralisedKL
    | TAID
    | ATKD
    | CrossEntropy
    | HiddenStates,
    Field(discriminator="kind"),
]

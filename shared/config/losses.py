"""Losses a config can name; each is a term in nats per token with a weight.

A section declares what the rest of the code asks of it, so that no list names losses: a further one
is a class, an entry in `Loss`, and an entry of its kind in `student_trainer.losses.registry`.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from shared.config.adaptive_losses import ATKD, Preference, TokenTemperature
from shared.config.base import Fraction, LossSection, Positive


class Divergence(LossSection):
    """A distance of the student's distribution q from the teacher's p at one temperature.

    Over the ids the teacher shipped and one bucket for the rest; `student_trainer.losses.terms.
    divergences` holds formulas, sources and laws of all.
    """

    reads_ids: ClassVar[bool] = True

    weight: Positive = 1.0
    temperature: Positive = 1.0
    times_temperature_squared: bool = True

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Its one."""
        return (self.temperature,)


class ForwardKL(Divergence):
    """KL(p || q)."""

    takes_drawn_ids: ClassVar[bool] = True

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Divergence):
    """KL(q || p)."""

    student_weighted: ClassVar[str | None] = ""

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

    student_weighted: ClassVar[str | None] = "beta above 0"

    kind: Literal["jsd"] = "jsd"
    beta: Fraction = 0.5
    continuous: bool = False

    @property
    def weighs_by_student(self) -> bool:
        """Unless beta is 0, where it is forward KL."""
        return self.beta > 0

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

    student_weighted: ClassVar[str | None] = ""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)


class TotalVariation(Divergence):
    """Half the sum of |p - q|."""

    student_weighted: ClassVar[str | None] = ""

    kind: Literal["total_variation"] = "total_variation"


class AKL(Divergence):
    """Forward and reverse KL, weighted by the gaps in the teacher's head and tail.

    (arXiv 2404.02657.)
    """

    student_weighted: ClassVar[str | None] = "mu below 1"

    kind: Literal["akl"] = "akl"
    mu: Fraction = Field(default=0.5, description="teacher mass of the head")

    @property
    def weighs_by_student(self) -> bool:
        """Unless mu is 1, where it is forward KL."""
        return self.mu < 1


class AlphaBeta(Divergence):
    """The alpha-beta divergence of ABKD (arXiv 2505.04560); its published defaults.

    Alpha 1 with beta towards 0 is forward KL, alpha towards 0 with beta 1 reverse KL, both 1 half
    the squared distance.
    """

    student_weighted: ClassVar[str | None] = ""

    kind: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(default=0.2, ge=0.01, le=2)
    beta: float = Field(default=0.7, ge=0.01, le=2)


class GeneralisedKL(Divergence):
    """sum p log(p / q) - p + q over the kept ids alone; in reverse p and q swapped."""

    student_weighted: ClassVar[str | None] = "direction reverse"

    kind: Literal["generalised_kl"] = "generalised_kl"
    direction: Literal["forward", "reverse"] = "forward"

    @property
    def weighs_by_student(self) -> bool:
        """In reverse."""
        return self.direction == "reverse"


class TAID(Divergence):
    """Cross-entropy with t p + (1 - t) q, where t grows as the loss falls (arXiv 2501.16937).

    q carries no gradient in the target. Probabilities are mixed, where the published code mixes
    logits. Defaults are the published code's; the paper takes t_start 0.2 for Llama-2.
    """

    single: ClassVar[str | None] = "its t follows one loss"

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


class PolicyGradient(LossSection):
    """Reverse KL of whole texts by policy gradient: on-policy distillation, and the long-term part
    of MiniLLM (arXiv 2306.08543); 0 on tokens that the student did not write.

    The reward of a token is r = log p - log q, q as it wrote it. `credit` says which of them a
    token's advantage A is made of, and its loss is -A times its importance ratio.
    """

    of_rollouts: ClassVar[bool] = True
    single: ClassVar[str | None] = "the advantages are the step's"

    kind: Literal["policy_gradient"] = "policy_gradient"
    weight: Positive = 1.0
    credit: Literal["token", "return", "later_mean", "remaining_mean", "discounted_mean"] = Field(
        default="token",
        description="token: r alone (OPD); return: the discounted sum from it on; later_mean: the "
        "mean of those after it (MiniLLM, Eq. 6); remaining_mean: the return over the tokens left "
        "(its published code); discounted_mean: the return over the sum of discounts (TRL)",
    )
    discount: Fraction = Field(default=1.0, description="of a reward, for each token in between")
    clip: Positive | None = Field(
        default=None,
        description="of a ratio, as in PPO: it counts within 1 - clip to 1 + clip",
    )
    whiten: bool = Field(
        default=False,
        description="give the advantages of each micro-batch, over workers, mean 0 and variance 1, "
        "as MiniLLM's published code does: that takes away how far the student is off, and how a "
        "step is cut decides",
    )

    @model_validator(mode="after")
    def _the_discount_is_read(self) -> "PolicyGradient":
        if self.discount != 1 and self.credit in ("token", "later_mean"):
            raise ValueError(
                f"the discount of policy_gradient is {self.discount:g}, but credit {self.credit} "
                "has none; leave it out, or take return, remaining_mean or discounted_mean"
            )
        return self


class CrossEntropy(LossSection):
    """Cross-entropy with the text's own next token."""

    asks_teacher: ClassVar[bool] = False

    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: Positive = 1.0


class HiddenStates(LossSection):
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

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The keys of `layers`."""
        return tuple(self.layers)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The values of `layers`."""
        return tuple(self.layers.values())

    def in_phase(self, phase: int, *, phases: int) -> Self:
        """The loss as it counts in a phase of progressive distillation, counted from 0.

        AKD learns representations first and outputs later (Saxena, Janzen and Maass, WiML 2024).
        """
        if self.final_weight is None:
            return self
        share = phase / (phases - 1)
        weight = (1 - share) * self.weight + share * self.final_weight
        return self.model_copy(update={"weight": weight})


class SelfFeatures(LossSection):
    """The student's deep layers, without gradient, supervise its shallow ones.

    (Self-feature regularization, arXiv 2103.07350, withdrawn by its authors; reconstructed.) Layer
    0 is the embedding's output, layer L the last one, after the final norm.
    """

    asks_teacher: ClassVar[bool] = False
    single: ClassVar[str | None] = "its projections are by layer"

    kind: Literal["self_features"] = "self_features"
    weight: float = Field(default=0.1, ge=0)
    layers: dict[int, int] = Field(
        min_length=1, description="shallow layer -> deep layer of the student that supervises it"
    )
    group: int | None = Field(
        default=None,
        ge=1,
        description="neighbouring channels averaged in both; null: a learned projection",
    )

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Both of every pair."""
        return (*self.layers, *self.layers.values()) if self.weight else ()

    @model_validator(mode="after")
    def _deep_ones_supervise(self) -> Self:
        for shallow, deep in self.layers.items():
            if shallow >= deep:
                raise ValueError(
                    f"self_features has layer {deep} supervise layer {shallow}, which is no "
                    "shallower; write layers as {shallow: deep}"
                )
        return self


class EntityContrast(LossSection):
    """Pull marked entities towards a moved copy and away from the words around them: InfoNCE.

    (CLLMFS, arXiv 2408.12834; `student_trainer.losses.auxiliary.contrast` has what is
    reconstructed.) Of task marking.
    """

    asks_teacher: ClassVar[bool] = False
    single: ClassVar[str | None] = "it is about all entities of a row"
    moves: ClassVar[bool] = True

    kind: Literal["entity_contrast"] = "entity_contrast"
    weight: Positive = 0.1
    layer: int = Field(
        ge=0, description="of the student, a middle one; 0 is the embedding's output"
    )
    tau: Positive = Field(default=0.1, description="temperature of the cosines")
    epsilon: Positive = Field(default=0.1, description="how far each embedding is moved, its norm")

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Its one."""
        return (self.layer,)


class RouterBalance(LossSection):
    """Use the experts of a mixture evenly: the load-balancing loss of the student's routers.

    (Switch Transformer, arXiv 2101.03961.) A student whose own config asks for it
    (`output_router_logits`) has it without being told, with its config's coefficient and number of
    experts; weight 0 leaves it out.
    """

    asks_teacher: ClassVar[bool] = False
    single: ClassVar[str | None] = "it is about all routers"

    kind: Literal["router_balance"] = "router_balance"
    weight: float = Field(default=0.001, ge=0)
    experts_per_token: int = Field(default=2, ge=1, description="experts a token is sent to")


Loss = Annotated[
    ForwardKL
    | ReverseKL
    | SoftCrossEntropy
    | JSD
    | SkewForwardKL
    | SkewReverseKL
    | TotalVariation
    | AKL
    | AlphaBeta
    | GeneralisedKL
    | TAID
    | ATKD
    | TokenTemperature
    | PolicyGradient
    | Preference
    | CrossEntropy
    | HiddenStates
    | SelfFeatures
    | EntityContrast
    | RouterBalance,
    Field(discriminator="kind"),
]

# Every loss by its kind.
KINDS: dict[str, type[LossSection]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(Loss)[0])
}


def check_single(losses: Sequence[Loss]) -> None:
    """Raise ValueError where a run has two of a loss that must be its only one."""
    kinds = [loss.kind for loss in losses]
    for loss in losses:
        if loss.single is not None and kinds.count(loss.kind) > 1:
            raise ValueError(f"losses has more than one {loss.kind}; keep one, {loss.single}")

"""Losses a config can name; each is a term in nats per token with a weight."""

from typing import Annotated, Literal

from pydantic import Field

from shared.config_base import Positive, Section


class ForwardKL(Section):
    """KL(teacher || student) over the kept ids and the tail bucket, times temperature squared."""

    kind: Literal["forward_kl"] = "forward_kl"
    weight: Positive = 1.0
    temperature: Positive = 1.0
    times_temperature_squared: bool = True


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
    layers: dict[int, int] = Field(min_length=1, description="teacher layer -> student layer")
    distance: Literal["mse", "cosine"] = "mse"


Loss = Annotated[ForwardKL | CrossEntropy | HiddenStates, Field(discriminator="kind")]

"""What the models of the embedded default are and how they are trained."""

from dataclasses import dataclass

from cluster.builtin.corpus import DOMAINS


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model of the embedded default and its training; a new plan is a new model."""

    width: int
    layers: int
    heads: int
    domains: tuple[str, ...]  # what it reads
    steps: int
    rows_per_step: int
    context: int  # tokens of a training row
    muon_lr: float = 0.02
    adam_lr: float = 0.02
    warmup_steps: int = 10
    max_length: int = 512  # positions the model is declared for
    seed: int = 0


def plans() -> dict[str, ModelPlan]:
    """What the two models are and how they are trained."""
    return {
        "teacher": ModelPlan(
            width=192,
            layers=4,
            heads=6,
            domains=DOMAINS,
            steps=600,
            rows_per_step=16,
            context=128,
        ),
        "student": ModelPlan(
            width=128,
            layers=2,
            heads=4,
            domains=("python",),
            steps=80,
            rows_per_step=4,
            context=128,
        ),
    }

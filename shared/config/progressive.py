"""Progressive distillation: how the text is cut into phases, and when one ends."""

from typing import Annotated, Literal

from pydantic import Field

from shared.config.base import Section

Part = Annotated[float, Field(ge=0, lt=1)]


class Progressive(Section):
    """Phases from simple to complex text (AKD, Saxena, Janzen and Maass, WiML 2024).

    Each domain's rows are cut by difficulty into one part per phase, of equal loss tokens. A phase
    draws the new part and replays those before it. It ends at the first decision that takes effect
    when the phase has lasted `max_steps`, or once it brings too little.
    """

    difficulty: Literal["teacher_nll", "teacher_entropy", "gap", "length"] = "teacher_nll"
    phases: int = Field(
        default=3, ge=2, description="parts that each domain's text is cut into by difficulty"
    )
    replay: Part = Field(
        default=0.2, description="share of loss tokens for the parts of earlier phases"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="a phase ends when it has lasted this many steps"
    )
    plateau: Part | None = Field(
        default=0.01,
        description="a phase ends when the gap to the teacher on validation text falls by a "
        "smaller part than this",
    )
    patience: int = Field(default=2, ge=1, description="decisions over which the gap has to fall")
    interval: int | None = Field(
        default=None,
        ge=1,
        description="steps between decisions under fixed weights; by default about ten decisions "
        "in each phase's share of the steps",
    )

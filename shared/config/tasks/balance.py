"""Learning rates that keep what a student sees with and what it says with in step."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from shared.config.base import Momentum, Positive, Section

if TYPE_CHECKING:
    from shared.config.run import Config


class Balance(Section):
    """The balance of CoMMIT (arXiv 2407.20454): how much a step of the vision part, its projector
    included, changes what the student says, over how much a step of the language part does. Both
    learning rates are multiplied so that this comes to 1.

    The paper's equations are not public in full; what stands here is made from its abstract and
    its reviews, and without its regulariser, which asks for larger steps.
    """

    every: int = Field(default=10, ge=1, description="steps between measurements")
    decay: Momentum = Field(default=0.9, description="what a measurement leaves of those before it")
    least: Positive = Field(default=0.5, description="that a learning rate is multiplied by")
    most: Positive = Field(default=2.0, description="that a learning rate is multiplied by")
    positions: int = Field(
        default=64,
        ge=1,
        description="of each worker's first rows with images, looked at to measure",
    )

    @model_validator(mode="after")
    def _around_one(self) -> "Balance":
        if not self.least <= 1 <= self.most:
            raise ValueError(
                f"balance.least is {self.least:g} and balance.most {self.most:g}; 1, which leaves "
                "a learning rate as it is, must lie between them"
            )
        return self


def check_balance(config: "Config") -> None:
    """Raise ValueError where there are no two parts to keep in step, or not their weights whole."""
    if config.optimiser.balance is None:
        return
    contradictions = {
        f"task is {config.task.kind}, whose student has no part that sees; set task=image_text, or "
        "leave it out": not config.task.sees,
        f"student.zero is {config.student.zero}, under which no worker holds a weight whole; set "
        "student.zero=2": config.student.zero == 3,
        "student.workers has bounds, and a number of workers that changes regroups weights; set "
        "one number": config.student.bounds.min != config.student.bounds.max,
    }
    for said, found in contradictions.items():
        if found:
            raise ValueError(f"optimiser.balance is set, but {said}")

"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

import math

from shared.config.run import Optimiser


def learning_rate(optimiser: Optimiser, *, step: int, steps: int) -> float:
    """Rate of the update that follows `step` updates, of `steps` in all.

    Rises linearly to `lr` over `warmup_steps` updates, then stays, or falls on a line or half a
    cosine to `final_lr_fraction * lr` at the last update.
    """
    if step < optimiser.warmup_steps:
        return optimiser.lr * (step + 1) / optimiser.warmup_steps
    decaying = max(1, steps - 1 - optimiser.warmup_steps)
    progress = min(1.0, (step - optimiser.warmup_steps) / decaying)
    match optimiser.schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = optimiser.final_lr_fraction if optimiser.schedule != "constant" else 0.0
    return optimiser.lr * (floor + (1.0 - floor) * remaining)


def respread(optimiser: Optimiser, *, step: int, before: int, after: int) -> str:
    """A sentence on the learning rate of a run of `before` steps that goes on after `step` of them,
    to take `after` in all."""
    last, following = (
        f"{learning_rate(optimiser, step=number, steps=steps):.2e}"
        for number, steps in ((max(0, step - 1), before), (step, after))
    )
    if optimiser.schedule == "constant":
        return f"the learning rate of step {step + 1} is {following}"
    before_it = f", where step {step} took {last}" if step else ""
    return (
        f"the {optimiser.schedule} schedule of the learning rate spans {after} steps in place of "
        f"{before}: step {step + 1} takes {following}{before_it}"
    )

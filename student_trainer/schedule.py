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

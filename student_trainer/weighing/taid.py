"""TAID's controller: how much of the target is the teacher's, from the losses so far.

After every step but the first (arXiv 2501.16937, as in its published code), with L the step's mean
loss, last that of the step before, and n the steps done before it out of `steps`,

    m = beta m + (1 - beta) (last - L) / (last + 1e-15)
    t = min(t_end, max(t_start + (t_end - t_start) n / steps, t + alpha sigmoid(m) (1 - t)))

so that t grows at least on a line, and faster while the loss falls. All ranks compute it from the
same all-reduced loss; checkpoints keep it.
"""

import math
from dataclasses import asdict, dataclass, replace

from shared.config.losses import TAID


@dataclass(frozen=True, slots=True)
class Interpolation:
    """The controller's state; without a TAID loss it stays at the teacher."""

    teacher_share: float  # t
    momentum: float = 0.0  # m
    last_loss: float | None = None  # nats per token

    @staticmethod
    def start(term: TAID | None) -> "Interpolation":
        """Before the first step."""
        return Interpolation(1.0 if term is None else term.t_start)

    def after(self, loss: float, term: TAID, *, step: int, steps: int) -> "Interpolation":
        """The state after step `step`, counted from 0; the first step only notes its loss."""
        if self.last_loss is None:
            return replace(self, last_loss=loss)
        change = (self.last_loss - loss) / (self.last_loss + 1e-15)
        momentum = term.beta * self.momentum + (1 - term.beta) * change
        sigmoid = (1 + math.tanh(momentum / 2)) / 2
        share = self.teacher_share + term.alpha * sigmoid * (1 - self.teacher_share)
        line = term.t_start + (term.t_end - term.t_start) * step / steps
        return Interpolation(min(term.t_end, max(line, share)), momentum, loss)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps; floats survive JSON exactly."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, float | None]) -> "Interpolation":
        """The inverse of `state`."""
        return Interpolation(**state)  # type: ignore[arg-type]

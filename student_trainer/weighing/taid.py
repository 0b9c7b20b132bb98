"""TAID's controller: how much of the target is the teacher's, from the losses so far.

After every step but the first (arXiv 2501.16937, as in its published code), with L the step's mean
loss, last that of the step before, and n the steps done before it out of `steps`,

    m = beta m + (1 - beta) (last - L) / (last + 1e-15)
    t = min(t_end, max(t_start + (t_end - t_start) n / steps, t + alpha sigmoid(m) (1 - t)))

so that t grows at least on a line, and faster while the loss falls. All ranks compute it from the
same all-reduced loss; checkpoints keep it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from shared.config.losses import TAID


@dataclass(slots=True)
class TAIDState:
    """The controller's state, a `Stateful` part of a run; without a TAID loss it stays at the
    teacher."""

    teacher_share: float  # t
    momentum: float = 0.0  # m
    last_loss: float | None = None  # nats per token

    @staticmethod
    def start(term: TAID | None) -> "TAIDState":
        """Before the first step."""
        return TAIDState(1.0 if term is None else term.t_start)

    def follow(self, loss: float, term: TAID, *, step: int, steps: int) -> None:
        """Move on after step `step`, counted from 0; the first step only notes its loss."""
        if self.last_loss is not None:
            change = (self.last_loss - loss) / (self.last_loss + 1e-15)
            self.momentum = term.beta * self.momentum + (1 - term.beta) * change
            sigmoid = (1 + math.tanh(self.momentum / 2)) / 2
            share = self.teacher_share + term.alpha * sigmoid * (1 - self.teacher_share)
            line = term.t_start + (term.t_end - term.t_start) * step / steps
            self.teacher_share = min(term.t_end, max(line, share))
        self.last_loss = loss

    def state(self) -> dict[str, float | None]:
        """See `Stateful`."""
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self.teacher_share, self.momentum = state["teacher_share"], state["momentum"]
        self.last_loss = state["last_loss"]

"""How much a student writes itself, by its validation loss, and what it learns again: DistiLLM's
scheduler with its replay buffer (arXiv 2402.03898).

phi is the share of tokens that are the student's own. A look at the validation loss raises it where
the loss is no better than the loss of the look that raised it last, plus a tolerance. Of the
student's own rows the share 1 - step / steps is written anew, and all of them while the buffer of
their domain is not full; the others are drawn from it. A buffer holds where rows were written,
which lie on disk.

R rows of a block   D domains in config order
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.config.source import AdaptiveShare
from shared.data.rollouts import DATA_SET, STUDENT

Written = tuple[int, int]  # step, and place in it


@dataclass(frozen=True, slots=True)
class Dealt:
    """Who answers the rows of a block."""

    who_R: np.ndarray  # `STUDENT` or `DATA_SET`, int64
    replayed: dict[int, Written]  # by place; rows that others written before stand in for


@dataclass(slots=True)
class Adaptive:
    """The state of the scheduler, the same on every rank; satisfies `Stateful`."""

    section: AdaptiveShare
    seed: int
    steps: int
    phi: float = field(init=False)
    reference: float | None = None  # nats per token; None: nobody has looked
    buffers: dict[int, deque[Written]] = field(default_factory=dict)  # by domain

    def __post_init__(self) -> None:
        self.phi = self.section.start

    def is_due(self, step: int) -> bool:
        """Whether the validation loss is looked at before a step."""
        return step % self.section.every == 0

    def follow(self, loss: float) -> None:
        """Take in a validation loss, nats per token."""
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.section.tolerance:
            self.phi, self.reference = min(1.0, self.phi + self.section.growth), loss

    def deal(
        self, step: int, domain_R: np.ndarray, *, of_rows: Callable[[int, float], float]
    ) -> Dealt:
        """Who answers the rows of step `step`, whose domains these are; rows written anew enter
        their buffers. `of_rows` has a domain's share of rows for a share of its tokens."""
        generator = np.random.default_rng([self.seed & (2**64 - 1), step])
        # One number in each of R equal parts of 0 to 1, so that a block is near its share.
        part_R = generator.permutation(len(domain_R))
        chance_R = (part_R + generator.random(len(domain_R))) / max(1, len(domain_R))
        pick_R = generator.random(len(domain_R))
        anew = 1 - step / self.steps
        who_R, replayed, written = np.full(len(domain_R), DATA_SET), {}, []
        for place, domain in enumerate(domain_R.tolist()):
            share, buffer = of_rows(domain, self.phi), self._buffer(domain)
            if chance_R[place] >= share:
                continue
            if chance_R[place] < share * anew or len(buffer) < self.section.replay_rows:
                who_R[place] = STUDENT
                written.append((domain, place))
            else:
                replayed[place] = buffer[int(pick_R[place] * len(buffer))]
        for domain, place in written:
            self._buffer(domain).append((step, place))
        return Dealt(who_R, replayed)

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        buffers = {str(domain): [list(w) for w in kept] for domain, kept in self.buffers.items()}
        return {"phi": self.phi, "reference": self.reference, "buffers": buffers}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self.phi, self.reference = state["phi"], state["reference"]
        self.buffers = {}
        for domain, kept in state["buffers"].items():
            self._buffer(int(domain)).extend((step, place) for step, place in kept)

    def _buffer(self, domain: int) -> deque[Written]:
        return self.buffers.setdefault(domain, deque(maxlen=self.section.replay_rows))


def oldest_step(state: dict[str, Any]) -> float:
    """The first step whose rows a state's buffers hold; infinity for none."""
    return min((step for kept in state["buffers"].values() for step, _ in kept), default=np.inf)

"""The balance between what a student sees with and what it says with (CoMMIT, arXiv 2407.20454).

kappa = KL(P(y | S', X), P(y | S, X)) / KL(P(y | S, X'), P(y | S, X)), where S is the vision part
with its projector, X the language part, and a prime is after the step: how far the step of each
part alone moves what the student says. The rates of both are multiplied by f(1 / kappa) and
f(kappa), f(x) = x^(1/4) within bounds. KL grows with the square of a step, so that a kappa of k at
equal rates becomes 1.

N positions looked at   V vocabulary   two sides: vision, language
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.config.tasks.balance import Balance
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.run.metrics import BalanceMetrics
from student_trainer.models.image_text import SIDES, ImageTextStudent
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch, Layouts, Step

POWER = 0.25


@dataclass(frozen=True, slots=True)
class Before:
    """A step that is about to be taken: what the student says, and the weights of each side."""

    batch: Batch
    logp_NV: Tensor
    weights: tuple[list[Tensor], ...]


@dataclass(slots=True)
class ModalityBalance:
    """Follows how far each side's steps move the student; satisfies `Stateful`. All ranks call
    every method together."""

    asked: Balance
    engine: Any  # a DeepSpeed engine around the Objective
    ranks: Ranks
    sides: tuple[list[nn.Parameter], ...]  # trained weights of each
    _moved_2: np.ndarray = field(default_factory=lambda: np.zeros(2))  # KL at equal rates, running
    _last_2: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the last measurement
    _seconds: float = 0.0

    @property
    def factors(self) -> dict[str, float]:
        """What the learning rate of each side is multiplied by."""
        kappa = ratio(self._moved_2)
        return dict(zip(SIDES, factors_of(kappa, self.asked), strict=True))

    def is_due(self, step: int) -> bool:
        """Whether the update of a step is measured."""
        return step % self.asked.every == 0

    def chosen(self, drawn: Step, layouts: Layouts) -> Batch | None:
        """What a step's update is measured on: of this rank's first unit with images the rows that
        have some, and no position on a rank without any. None, on all ranks, where the step is not
        measured, or has no image: what was measured before then stands."""
        if not self.is_due(drawn.index):
            return None
        rows = with_images(drawn.units)
        if not self.ranks.sum(np.array([float(rows is not None)]))[0]:
            return None
        if rows is not None:
            return layouts.batch(rows)
        batch = layouts.batch(drawn.units[0])
        return batch | {"loss_index_N": batch["loss_index_N"][:0]}

    @contextmanager
    def watching(self, batch: Batch | None) -> Iterator[None]:
        """Measure the update of a `with` on a batch of the step; nothing without one."""
        if batch is None:
            yield
            return
        began = time.perf_counter()
        few = _fewer(batch, self.asked.positions)
        weights = tuple([p.detach().clone() for p in side] for side in self.sides)
        before = Before(few, self._said(few), weights)
        self._seconds += time.perf_counter() - began
        factors_2 = np.array([*self.factors.values()])
        yield
        began = time.perf_counter()
        self._follow(self._moved(before), factors_2)
        self._seconds += time.perf_counter() - began

    def line(self) -> BalanceMetrics:
        """What was measured last, and what follows from all of it."""
        factors, kappa = self.factors, ratio(self._last_2)
        return BalanceMetrics(
            kappa=kappa if math.isfinite(kappa) else None,
            vision_factor=factors["vision"],
            language_factor=factors["language"],
        )

    def take_seconds(self) -> float:
        """Seconds of measuring since the last call."""
        found, self._seconds = self._seconds, 0.0
        return found

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"moved": self._moved_2.tolist(), "last": self._last_2.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self._moved_2, self._last_2 = np.array(state["moved"]), np.array(state["last"])

    def _moved(self, before: Before) -> np.ndarray:
        """How far the step of each side alone moves what the student says, nats, summed over the
        positions of all ranks [2]."""
        after = [[p.detach().clone() for p in side] for side in self.sides]
        found_2 = np.zeros(2)
        for number, other in ((0, 1), (1, 0)):
            _put(self.sides[other], before.weights[other])
            found_2[number] = float(_divergence(self._said(before.batch), before.logp_NV))
            _put(self.sides[other], after[other])
        return self.ranks.sum(found_2)

    def _follow(self, moved_2: np.ndarray, factors_2: np.ndarray) -> None:
        """Take in a measurement, made under these factors."""
        self._last_2 = moved_2
        equal_2 = moved_2 / factors_2**2
        decay = self.asked.decay if self._moved_2.any() else 0.0
        self._moved_2 = decay * self._moved_2 + (1 - decay) * equal_2

    def _said(self, batch: Batch) -> Tensor:
        """Log-probabilities [N, V] without dropout."""
        training = self.engine.training
        self.engine.eval()
        with torch.no_grad():
            (logits_NV,) = self.engine(batch, mode="logits")
        self.engine.train(training)
        return logits_NV.double().log_softmax(-1)


def open_balance(
    asked: Balance | None,
    student: Student,
    engine: Any,
    ranks: Ranks,
) -> ModalityBalance | None:
    """What keeps a student's sides in step; None where nothing is asked."""
    if asked is None:
        return None
    assert isinstance(student, ImageTextStudent), "the config says that it sees"
    named, sides = dict(engine.module.named_parameters()), student.sides(engine.module)
    weights = tuple([named[n] for n, side in sides.items() if side == own] for own in SIDES)
    for own, found in zip(SIDES, weights, strict=True):
        if not found:
            raise ConfigError(
                f"optimiser.balance is set, but no weight of the student's {own} part trains; set "
                "student.train.target_modules to modules of both, or leave it out"
            )
    return ModalityBalance(asked, engine, ranks, weights)


def ratio(moved_2: np.ndarray) -> float:
    """kappa; 1 where neither side moves anything, or nothing was measured yet."""
    vision, language = moved_2.tolist()
    if vision == language:
        return 1.0
    return vision / language if language else float("inf")


def factors_of(kappa: float, asked: Balance) -> tuple[float, float]:
    """What the rates of the vision part and of the language part are multiplied by."""
    return _clipped(1 / kappa if kappa else float("inf"), asked), _clipped(kappa, asked)


def with_images(units: Sequence[Rows]) -> Rows | None:
    """The rows that have images, of the first unit with some; None where no unit has any."""
    for rows in units:
        has_some = [bool(own) for own in rows.images()]
        if any(has_some):
            return rows.where(has_some)
    return None


def _clipped(x: float, asked: Balance) -> float:
    return float(min(max(x**POWER, asked.least), asked.most))


def _fewer(batch: Batch, most: int) -> Batch:
    """A batch of which a few positions with loss are looked at, evenly apart."""
    index_N = batch["loss_index_N"]
    step = max(1, -(-len(index_N) // most))
    return batch | {"loss_index_N": index_N[::step]}


def _divergence(new_NV: Tensor, old_NV: Tensor) -> Tensor:
    """KL of what is said after from what was said before, summed over positions, nats. With the
    difference of both masses, which is 0, no term is negative, so that small ones do not cancel."""
    new_mass_NV, old_mass_NV = new_NV.exp(), old_NV.exp()
    return (new_mass_NV * (new_NV - old_NV) + old_mass_NV - new_mass_NV).sum()


@torch.no_grad()
def _put(side: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(side, weights, strict=True):
        parameter.copy_(weight)

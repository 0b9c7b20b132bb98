"""The student while it writes in its own workers: whole on every rank, without dropout, in no
collective per token."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shared.targets.generation import Generator
from student_trainer.accelerator import deepspeed


class Writer(Protocol):
    """Who writes what the student of a moment would: its workers, or copies apart from them."""

    @property
    def apart(self) -> bool:
        """Whether the workers may learn while it writes."""
        ...

    def prepare(self, version: int) -> None:
        """Take over the weights of the moment, behind which are `version` updates; all ranks
        together."""
        ...

    def at(self, version: int) -> AbstractContextManager[Generator]:
        """What writes with a version that was prepared, the last one or, apart, one that a step to
        come names; for the length of a `with`, without a word to other ranks."""
        ...

    def take_bytes(self) -> int:
        """Bytes of weights that this rank has pushed since the last call."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Report the time of a `with` as waited for what it writes."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...


@dataclass(frozen=True, slots=True)
class OwnRanks:
    """The workers write themselves, around their own student; a `Writer`.

    Under ZeRO-3, where no rank holds them whole, that is a copy of the student on each, into which
    those that train are gathered before it writes: ranks that write texts of different lengths
    then never wait for each other within one.
    """

    generator: Generator  # around `model`
    model: nn.Module  # what writes: the student's own module, or the copy of it
    trained: nn.Module  # the student's own
    engine: Any  # a DeepSpeed engine
    apart: bool = False

    def prepare(self, version: int) -> None:
        """See `Writer`."""
        if self.model is not self.trained:
            self._gather()

    @contextmanager
    def at(self, version: int) -> Iterator[Generator]:
        """See `Writer`."""
        was_training = self.engine.module.training
        self.engine.eval()
        try:
            yield self.generator
        finally:
            if was_training:
                self.engine.train()

    def take_bytes(self) -> int:
        """See `Writer`."""
        return 0

    def waiting(self) -> AbstractContextManager[None]:
        """See `Writer`: nobody is told."""
        return nullcontext()

    def close(self) -> None:
        """See `Writer`: nothing is under way."""

    @torch.no_grad()
    def _gather(self) -> None:
        pairs = zip(self.trained.parameters(), self.model.parameters(), strict=True)
        for live, copied in pairs:
            if live.requires_grad:
                with deepspeed.zero.GatheredParameters([live]):
                    copied.copy_(live)


def copied_for_writing(student: nn.Module, *, zero: int) -> nn.Module:
    """The module that writes in place of a student that is about to be sharded; the student itself
    where it stays whole."""
    if zero < 3:
        return student
    return copy.deepcopy(student).eval().requires_grad_(False)

"""The student while it writes: whole on every rank, without dropout, in no collective per token."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from student_trainer.accelerator import deepspeed


@dataclass(frozen=True, slots=True)
class Writing:
    """What a generator is put around, and how it gets the weights of the moment.

    Under ZeRO-3, where no rank holds them whole, that is a copy of the student on each, into which
    those that train are gathered before it writes: ranks that write texts of different lengths
    then never wait for each other within one.
    """

    model: nn.Module  # what writes: the student's own module, or the copy of it
    trained: nn.Module  # the student's own
    engine: Any  # a DeepSpeed engine

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Have it ready to write for the length of a `with`; all ranks together."""
        was_training = self.engine.module.training
        self.engine.eval()
        if self.model is not self.trained:
            self._gather()
        try:
            yield
        finally:
            if was_training:
                self.engine.train()

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

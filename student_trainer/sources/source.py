"""Where a step's tokens come from, behind one protocol.

D domains in config order
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shared.data.rows import Rows
from shared.run.plan import RunPlan
from shared.targets.question import Question
from student_trainer.ranks import Ranks
from student_trainer.sources.followed_log import FollowedLog

# What is counted of writing: seconds that the student wrote and its tokens, seconds that texts of
# the teacher took and the tokens that were not there before, bytes of weights that were pushed, and
# seconds in which nothing else was done.
EFFORT = (
    "writing_s",
    "tokens_written",
    "teacher_writing_s",
    "teacher_tokens_written",
    "pushed_bytes",
    "writing_wait_s",
)


@dataclass(frozen=True, slots=True)
class DomainCounts:
    """What a step holds of each domain, over all ranks."""

    tokens_D: np.ndarray  # int64; loss tokens
    rows_D: np.ndarray  # int64


@dataclass(frozen=True, slots=True)
class Drawn:
    """One optimiser step as its source hands it to a rank."""

    index: int
    units: tuple[Rows, ...]  # micro-batches of this rank; every rank has as many
    counts: DomainCounts | None  # None: nobody knows before all ranks' own are added up


FinishDrawn = Callable[[], Drawn]


class TokenSource(Protocol):
    """Draws the rows of every step. The order is a pure function of what checkpoints keep."""

    @property
    def ahead(self) -> int:
        """How many steps may be drawn before the step under way is taken; 0 where rows depend on
        the weights of the moment."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether every step is drawn so many steps ahead, never later, since what is drawn depends
        on the weights of then; False: as early as the mixture's weights are known."""
        ...

    def draw(self, step: int) -> Drawn | FinishDrawn:
        """The rows of step `step`, counted from 0. Steps are drawn in order, from any first one
        on, once the weight log settles them; all ranks draw together.

        Where others write them, what waits for that: to be called once, by any thread, after those
        of the steps before and without a word to other ranks."""
        ...

    def epochs(self, steps: int) -> tuple[float, ...]:
        """How often each domain's rows were gone through in the first `steps` steps [D]."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a checkpoint can only be resumed with, by its name in a sentence, as JSON takes
        it."""
        ...


class MovingTeacher(Protocol):
    """A teacher that changes in training: which version of it answers a step."""

    @property
    def lag(self) -> int:
        """How many steps ahead of the one under way may be asked about."""
        ...

    def question(self, question: Question, step: int) -> Question:
        """The question as it is asked about the rows of a step. Waits for the version; all ranks
        together. Raises TeacherError, or a UserError, on all ranks."""
        ...


OpenSource = Callable[[RunPlan, Ranks, FollowedLog], TokenSource]

"""Weights per position that are formed of a whole step before anything of it is learnt.

A weigher sees all ranks' and units' positions, so that what it forms does not depend on how the
step is cut.

N positions with loss of a unit
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from shared.data.layout import Layout
from shared.data.rows import Rows
from shared.targets.paired import PairedTargets
from shared.targets.routing import Answer, WholeAnswer, label_logprobs, teacher_entropies
from student_trainer.sources.batches import Layouts

Look = Literal["label_logprob", "entropy", "hellinger"]
Columns = dict[str, np.ndarray]  # name -> [N]
OF_TEACHER: dict[Look, Callable[[WholeAnswer], np.ndarray]] = {
    "label_logprob": label_logprobs,
    "entropy": teacher_entropies,
}


@dataclass(frozen=True, slots=True)
class UnitView:
    """What is known of a unit's positions before it is learnt from."""

    rows: Rows
    layouts: Layouts
    teacher: Answer | None  # its answer, or those of several
    # What the weigher looks at, float32 [N]: nats, or the Hellinger distance from the teacher.
    student: Mapping[Look, np.ndarray]

    @property
    def layout(self) -> Layout:
        """Label, row and document of each position."""
        return self.layouts.lay_out(self.rows)

    def of_teacher(self, look: Look) -> np.ndarray:
        """The teacher's, as shipped, float32 nats [N]; an entropy is shipped with drawn ids."""
        assert self.teacher is not None, "a loss asks the teacher"
        assert not isinstance(self.teacher, PairedTargets), "it reads the student's rows"
        return OF_TEACHER[look](self.teacher)


@dataclass(frozen=True, slots=True)
class StepView:
    """A step before it is learnt from: this rank's units in order, and a way to see the others'."""

    units: Sequence[UnitView]
    gather: Callable[[np.ndarray], list[np.ndarray]]  # what every rank has, in rank order

    def whole(self, quantity: Callable[[UnitView], np.ndarray]) -> np.ndarray:
        """A quantity at all positions of all units and ranks; all ranks call it together."""
        own = [quantity(unit) for unit in self.units]
        return np.concatenate(self.gather(np.concatenate(own)))


class Weigher(Protocol):
    """Forms columns of values per position, which losses read by name."""

    @property
    def looks(self) -> frozenset[Look]:
        """What it wants to know of the student, for which that reads the step once more."""
        ...

    def weigh(self, step: StepView) -> list[Columns]:
        """The columns of each of this rank's units; all ranks call it together.

        `weight_N` is what a position counts in the sum of all losses; other names are those that
        terms need.
        """
        ...

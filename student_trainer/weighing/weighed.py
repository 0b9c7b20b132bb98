"""A step's batches with the columns that weighers form of it beside them.

N positions with loss of a unit
"""

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch

from shared.config.losses import Loss
from shared.data.rows import Rows
from shared.targets.routing import Answer
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.weighing.advantages import Advantages
from student_trainer.weighing.preferences import PairLosses
from student_trainer.weighing.token_split import ClassWeights
from student_trainer.weighing.token_temperature import TokenTemperatures
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView, Weigher

# The weigher of a loss, by its kind.
WEIGHERS: dict[str, Callable[[Any], Weigher]] = {
    "atkd": ClassWeights,
    "policy_gradient": Advantages,
    "preference": PairLosses,
    "token_temperature": TokenTemperatures,
}


def weighers_of(losses: Sequence[Loss]) -> list[Weigher]:
    """The weighers that a run's losses come with."""
    return [WEIGHERS[loss.kind](loss) for loss in losses if loss.kind in WEIGHERS]


def weighed_batches(
    cut: Sequence[tuple[Rows, Answer | None]],
    layouts: Layouts,
    weighers: Sequence[Weigher],
    *,
    engine: Any,
    gather: Callable[[np.ndarray], list[np.ndarray]],
) -> Iterator[Batch]:
    """The tensors of a rank's units with the weighers' columns beside them.

    `engine` runs the student where a weigher looks at it; `gather` gives what every rank has. All
    ranks call it together, with as many units.
    """
    looks: set[Look] = {look for weigher in weighers for look in weigher.looks}
    seen = looked(engine, layouts, cut, looks)
    units = [
        UnitView(rows, layouts, answer, student)
        for (rows, answer), student in zip(cut, seen, strict=True)
    ]
    view = StepView(units, gather)
    columns_by_unit: list[Columns] = [{} for _ in units]
    for weigher in weighers:
        for columns, found in zip(columns_by_unit, weigher.weigh(view), strict=True):
            assert not columns.keys() & found.keys(), "two weighers form a column of one name"
            columns |= found
    for unit, columns in zip(units, columns_by_unit, strict=True):
        tensors = {name: torch.from_numpy(column_N) for name, column_N in columns.items()}
        moved = {name: column_N.to(layouts.device) for name, column_N in tensors.items()}
        yield layouts.batch(unit.rows, unit.teacher) | moved


def looked(
    engine: Any,
    layouts: Layouts,
    units: Sequence[tuple[Rows, Answer | None]],
    looks: Set[Look],
) -> list[dict[Look, np.ndarray]]:
    """What the student says of each unit, whose teacher's answer stands beside it: one forward pass
    each, without dropout.

    All ranks call it together, with as many units; no random number is drawn.
    """
    if not looks:
        return [{} for _ in units]
    names, training, found = sorted(looks), engine.training, []
    engine.eval()
    for rows, answer in units:
        batch = layouts.batch(rows, answer if "hellinger" in looks else None)
        with torch.no_grad():
            values = engine(batch, mode="look", looks=tuple(names))
        arrays = (value_N.float().cpu().numpy() for value_N in values)
        found.append(dict(zip(names, arrays, strict=True)))
    engine.train(training)
    return found

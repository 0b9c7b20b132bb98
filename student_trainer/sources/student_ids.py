"""The student's own ids: those it thinks likeliest, so that the teacher answers about them too.

They depend on the weights of the moment, so a step is asked about only once it is reached.

N positions with loss   M ids per position
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.data.rows import Rows
from shared.targets.asks.kept_ids import LikeliestIds
from student_trainer.sources.batches import Layouts


@dataclass(frozen=True, slots=True)
class StudentIds:
    """Names the ids of units, with the weights that the student has then."""

    engine: Any  # a DeepSpeed engine around the Objective
    layouts: Layouts
    ask: LikeliestIds

    def named(self, units: Sequence[Rows]) -> list[Rows]:
        """The units with the student's ids, one forward pass each, without dropout.

        All ranks call it together, with as many units; no random number is drawn.
        """
        self.engine.eval()
        named = []
        for rows in units:
            with torch.no_grad():
                batch = self.layouts.batch(rows)
                (ids_NM,) = self.engine(batch, mode="likeliest", asked=self.ask)
            named.append(rows.with_student_ids(ids_NM.cpu().numpy()))
        self.engine.train()
        return named

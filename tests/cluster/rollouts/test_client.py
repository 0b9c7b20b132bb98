"""What a worker asks the student's copies to write is cut in units of like lengths, and comes back
in its own order."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from cluster.rollouts.client import Copies
from shared.targets.generation import Continuations, GenerationSpec, Openings


@dataclass
class Echoing:
    """A pool whose replicas answer each opening with its own ids."""

    asked: list[Openings] = field(default_factory=list)
    answers: deque[Continuations] = field(default_factory=deque)

    def submit(self, openings: Openings, spec: GenerationSpec) -> None:
        self.asked.append(openings)
        ids = openings.ids()
        answer = Continuations.build(
            openings, spec, teacher={}, output_ids=ids, stopped=[len(each) % 2 == 0 for each in ids]
        )
        self.answers.append(answer)

    def next(self) -> Continuations:
        return self.answers.popleft()


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_answers_come_in_the_order_of_the_openings(batch_rows: int):
    lengths = [5, 60, 6, 2, 61, 30, 4, 33]
    openings = Openings.build(
        names=[f"d/{n}" for n in range(len(lengths))],
        input_ids=[np.arange(length) + 10 * n for n, length in enumerate(lengths)],
    )
    pool, spec = Echoing(), GenerationSpec(64)
    found = Copies(cast(Any, pool), batch_rows=batch_rows).generate(openings, spec)
    assert [ids.tolist() for ids in found.ids()] == [ids.tolist() for ids in openings.ids()]
    assert found.stopped() == [length % 2 == 0 for length in lengths]
    found.check(openings, spec, {})
    asked = [sorted(map(len, unit.ids())) for unit in pool.asked]
    assert [each for unit in asked for each in unit] == sorted(lengths)  # of like lengths
    assert [len(unit) for unit in asked[:-1]] == [batch_rows] * ((len(lengths) - 1) // batch_rows)

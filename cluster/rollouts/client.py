"""How a worker asks the student's copies to write: batches of openings, answered by the replicas of
a service."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from shared.data.passes import TOGETHER
from shared.targets.generation import Continuations, GenerationSpec, Openings
from teacher_service.service.pool import RolloutPool


class Copies:
    """Copies of the student behind a service; satisfies `RemoteGenerator`.

    At most `batch_rows` openings, of like lengths, are one unit, which a copy continues at once:
    cut as a worker's own generator cuts them, whatever the number of copies.
    """

    def __init__(self, pool: RolloutPool, *, batch_rows: int) -> None:
        self._pool, self._batch_rows = pool, batch_rows

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Generator`. Raises TeacherError where no copy answers in time."""
        from teacher_service.engine.generation.generating import (
            batches,  # slow, and the driver writes nothing
        )

        units = batches(openings, TOGETHER, most=self._batch_rows)
        for lines in units:
            self._pool.submit(openings.at(lines), spec)
        answers = [self._pool.next() for _ in units]
        return Continuations.joined(answers).at(np.argsort(np.concatenate(units)).tolist())

    def waiting(self) -> AbstractContextManager[None]:
        """See `RemoteGenerator`."""
        return self._pool.waiting()

    def close(self) -> None:
        """Drop what is under way; who waits for it hears that."""
        self._pool.close()


def open_copies(
    model: None, *, device: Any, dtype: str, batch_rows: int, settings: dict[str, Any]
) -> Copies:
    """A way to a service in a worker's process; with functools.partial over the settings of its
    pool, an `OpenGenerator`."""
    import torch.distributed as dist  # slow, and the driver writes nothing

    return Copies(RolloutPool(dist.get_rank(), apart=True, **settings), batch_rows=batch_rows)

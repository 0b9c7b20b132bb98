"""Sources of tokens that only tests have."""

from dataclasses import replace
from typing import Any

from shared.data.row_store import RowStore
from shared.run.plan import RunPlan
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.source import Drawn


class Uncounted(DataSet):
    """The data set, as a source whose rows nobody can know or count before their step."""

    ahead = 0  # type: ignore[assignment]

    def draw(self, step: int) -> Drawn:
        return replace(super().draw(step), counts=None)


class Alternating:
    """Every rank reads a domain of its own, in the order of the file, and another one next."""

    ahead, fixed = 0, False

    def __init__(self, plan: RunPlan, ranks: Ranks, weight_log: FollowedLog) -> None:
        self._stores = [RowStore.open(domain.train_path) for domain in plan.domains]
        self._rank, self._batch = ranks.rank, plan.config.batch
        self._weight_log, self._world_size = weight_log, ranks.world_size

    def draw(self, step: int) -> Drawn:
        self._weight_log.ruling(step)  # settled, or it raises
        store = self._stores[(step + self._rank) % len(self._stores)]
        size, per_rank = self._batch.micro_batch, self._batch.rows_per_step // self._world_size
        first = step * per_rank
        starts = range(first, first + per_rank, size)
        return Drawn(step, tuple(store.take(range(at, at + size)) for at in starts), None)

    def epochs(self, steps: int) -> tuple[float, ...]:
        return (float(steps),) * len(self._stores)

    def facts(self) -> dict[str, Any]:
        return {"the source": "alternating"}

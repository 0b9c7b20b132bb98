"""The longest rows of a run's text, and a source of tokens that begins with them.

R rows   D domains in config order
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.data.layout import padded_length
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet, Shard
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.source import DomainCounts, Drawn

OF_ALL = 2  # steps of the longest rows of all domains, before those of each teacher


def longest_steps(teachers: int) -> int:
    """Steps of longest rows, for a number of teachers."""
    return OF_ALL + teachers


class LongestFirst:
    """The longest rows, also those of each teacher alone, then the rows of the run; a
    `TokenSource`."""

    def __init__(self, plan: RunPlan, ranks: Ranks, weight_log: FollowedLog) -> None:
        self._plan, self._data = plan, DataSet(plan, ranks, weight_log)
        self._stores = [RowStore.open(domain.train_path) for domain in plan.domains]
        self._shard = Shard(ranks.rank, ranks.world_size, plan.config.batch.micro_batch)
        self._taught = [tuple(part.config.domains) for part in plan.by_teacher.values()]

    @property
    def ahead(self) -> int:
        """See `TokenSource`."""
        return self._data.ahead

    @property
    def fixed(self) -> bool:
        """See `TokenSource`."""
        return False

    def draw(self, step: int) -> Drawn:
        """See `TokenSource`."""
        if step >= longest_steps(len(self._taught)):
            return self._data.draw(step)
        names = [domain.name for domain in self._plan.domains]
        among = names if step < OF_ALL else self._taught[step - OF_ALL]
        chosen = [names.index(name) for name in among]
        size = self._plan.config.batch.rows_per_step
        rows = longest_rows(
            [self._stores[index] for index in chosen], size, packed=self._plan.packed
        )
        if self._plan.draws > 1:
            rows = rows.with_draws(np.zeros(size, np.int64))
        domain_R = np.array([names.index(name) for name in rows.domains()])
        tokens_D = np.bincount(domain_R, weights=rows.num_loss_tokens(), minlength=len(names))
        counts = DomainCounts(
            tokens_D.astype(np.int64), np.bincount(domain_R, minlength=len(names))
        )
        units = tuple(rows.part(unit) for unit in self._shard.units(size))
        return Drawn(step, units, counts)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """See `TokenSource`."""
        return self._data.epochs(steps)

    def facts(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return self._data.facts()


def longest_rows(stores: Sequence[RowStore], count: int, *, packed: bool) -> Rows:
    """The `count` rows that take most of a batch, the largest first, over and over where there are
    fewer. `packed` as in `lay_out`."""
    cells = [_cells(store, packed=packed) for store in stores]
    domain_R = np.repeat(np.arange(len(stores)), [len(own) for own in cells])
    index_R = np.concatenate([np.arange(len(own)) for own in cells])
    chosen = np.resize(np.argsort(-np.concatenate(cells), kind="stable")[:count], count)
    return take_rows(stores, domain_R[chosen], index_R[chosen])


def _cells(store: RowStore, *, packed: bool) -> np.ndarray:
    """Positions that each row fills, padding included [R]: one line, or one of each document."""
    found = [np.zeros(0, np.int64)]
    for number in range(store.reader.num_record_batches):
        batch = store.reader.get_batch(number)
        tokens_R = batch.column("input_ids").value_lengths().to_numpy()
        if packed:
            found.append(_padded(tokens_R))
            continue
        starts = batch.column("doc_starts")
        documents_R = starts.value_lengths().to_numpy()
        own_R = np.split(starts.flatten().to_numpy(), np.cumsum(documents_R)[:-1])
        pairs = zip(own_R, tokens_R, strict=True)
        longest_R = np.array([np.diff(own, append=tokens).max() for own, tokens in pairs])
        found.append(documents_R * _padded(longest_R))
    return np.concatenate(found)


def _padded(lengths: np.ndarray) -> np.ndarray:
    known = {int(length): padded_length(int(length)) for length in np.unique(lengths)}
    return np.array([known[int(length)] for length in lengths], np.int64)

"""The data set as a source of tokens: blocks of prepared rows, drawn by the weights in force.

R rows of a block   D domains in config order
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.rollouts import expected_tokens, share_of_rows
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.mixture.blocks import Block
from shared.mixture.curriculum import Curriculum, DomainParts, parts_of, whole_domain
from shared.mixture.weight_log import WeightLog
from shared.run.plan import RunPlan
from student_trainer.ranks import Ranks
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.source import DomainCounts, Drawn


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every block belongs to a rank."""

    rank: int
    world_size: int
    micro_batch: int

    def units(self, rows: int) -> list[slice]:
        """This rank's slices of a block of `rows` rows: micro-batch m of all ranks lies together,
        so that the first rows of a block are learnt from first on every rank."""
        stride = self.micro_batch * self.world_size
        firsts = range(self.rank * self.micro_batch, rows, stride)
        return [slice(first, first + self.micro_batch) for first in firsts]


class DataSet:
    """Rows on disk, in the order that (seed, weight log, step) decides; a `TokenSource`."""

    def __init__(self, plan: RunPlan, ranks: Ranks, weight_log: FollowedLog) -> None:
        self._plan, self._weight_log = plan, weight_log
        self._stores = tuple(RowStore.open(domain.train_path) for domain in plan.domains)
        self.shard = Shard(ranks.rank, ranks.world_size, plan.config.batch.micro_batch)
        self._domains = _parts(plan, self._stores)
        self.written_shares: tuple[float, ...] = (0.0,) * len(self._domains)  # of rows [D]
        if not plan.config.source.is_dataset and plan.mode == "train":
            self._domains, self.written_shares = _partly_written(plan, self._domains, self._stores)
        self._curriculum = empty_curriculum(plan, self._domains)

    @property
    def ahead(self) -> int:
        """See `TokenSource`."""
        return self._plan.config.prefetch_steps

    @property
    def fixed(self) -> bool:
        """See `TokenSource`."""
        return False

    def draw(self, step: int) -> Drawn:
        """Block `step` read from disk, once. The whole block is read to count its tokens; a rank
        keeps only its own units."""
        block, rows = self.block(step)
        domain_R, size = block.domain_index_R, len(self._stores)
        tokens_D = np.bincount(domain_R, weights=rows.num_loss_tokens(), minlength=size)
        counts = DomainCounts(tokens_D.astype(np.int64), np.bincount(domain_R, minlength=size))
        units = tuple(rows.part(unit) for unit in self.shard.units(len(rows)))
        return Drawn(step, units, counts)

    def block(self, step: int) -> tuple[Block, Rows]:
        """Block `step` of all ranks, and its rows read from disk. Of a selector's draws a row is
        learnt with another in every epoch."""
        block = self._ruled().block(step)
        rows = take_rows(self._stores, block.domain_index_R, block.row_index_R)
        if self._plan.draws > 1:
            rows = rows.with_draws(block.epoch_R % self._plan.draws)
        return block, rows

    def rows_drawn(self, step: int) -> np.ndarray:
        """Rows of each domain in all blocks before `step`, int64 [D]."""
        return self._ruled().rows_drawn(step)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """See `TokenSource`."""
        return self._ruled().epochs(steps)

    def facts(self) -> dict[str, Any]:
        """The size of every domain's text, and the order of its rows where phases have one."""
        domains = self._plan.domains
        rows = {f"the text of {d.name}": [d.num_rows, d.num_loss_tokens] for d in domains}
        return rows | {f"the order of {d.name}": d.digest for d in self._domains if d.digest}

    def _ruled(self) -> Curriculum:
        """The curriculum under every entry read."""
        if len(self._curriculum.log.entries) < self._weight_log.num_entries:
            self._curriculum = self._curriculum.with_log(self._weight_log.read)
        return self._curriculum


def _parts(plan: RunPlan, stores: Sequence[RowStore]) -> tuple[DomainParts, ...]:
    """Every domain cut into the parts of the run's phases; an evaluation alone needs none."""
    progressive = plan.config.progressive
    if progressive is None or plan.mode == "evaluate":
        return whole_domains(plan)
    paths = [Path(d.order_path) for d in plan.domains if d.order_path is not None]
    assert len(paths) == len(stores), "phases need an order of every domain's rows"
    return tuple(
        parts_of(domain.name, store=store, order_path=path, parts=progressive.phases)
        for domain, store, path in zip(plan.domains, stores, paths, strict=True)
    )


def _partly_written(
    plan: RunPlan, domains: Sequence[DomainParts], stores: Sequence[RowStore]
) -> tuple[tuple[DomainParts, ...], tuple[float, ...]]:
    """The domains with the loss tokens that their rows have where a part of them is written by
    models, and that part."""
    source, context = plan.config.source, plan.config.data.context
    found, shares = [], []
    for domain, store in zip(domains, stores, strict=True):
        written = expected_tokens(store, source, context=context)
        asked = source.student + source.teacher if source.dataset else 1.0
        share = share_of_rows(asked, written=written, given=store.mean_loss_tokens)
        means = (share * written + (1 - share) * mean for mean in domain.mean_loss_tokens_P)
        found.append(replace(domain, mean_loss_tokens_P=tuple(means)))
        shares.append(share)
    return tuple(found), tuple(shares)


def whole_domains(plan: RunPlan) -> tuple[DomainParts, ...]:
    """Every domain in one part, as a run without phases draws it."""
    return tuple(
        whole_domain(d.name, num_rows=d.num_rows, num_loss_tokens=d.num_loss_tokens)
        for d in plan.domains
    )


def empty_curriculum(plan: RunPlan, domains: Sequence[DomainParts]) -> Curriculum:
    """The draws of a run before any weight is known."""
    config = plan.config
    return Curriculum(
        seed=config.seed,
        domains=domains,
        rows_per_block=config.batch.rows_per_step,
        log=WeightLog(tuple(d.name for d in plan.domains), ()),
        replay=config.progressive.replay if config.progressive else 0.0,
    )

"""The data set as a source of tokens: blocks of prepared rows, drawn by the weights in force.

R rows of a block   D domains in config order
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.config.adaptive_losses import writes_pairs
from shared.data.augmented.augmenting import Augmenter
from shared.data.augmented.fills import Fills
from shared.data.rollouts import expected_tokens, share_of_rows
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.mixture.blocks import Block
from shared.mixture.curriculum import Curriculum, DomainParts, parts_of, whole_domain
from shared.mixture.weight_log import WeightLog
from shared.run.plan import RunPlan
from shared.text.digests import digest_file
from student_trainer.ranks import Ranks
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.source import DomainCounts, Drawn

FILLING = {"mask", "candidates", "copies", "across"}  # of `augmentation`, how masks are filled


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
        self._lengths: tuple[Lengths, ...] = ()
        if not plan.config.source.is_dataset and plan.mode == "train":
            self._lengths = _lengths(plan, self._stores)
            self._domains = _partly_written(plan, self._domains, self._lengths)
        self._curriculum = empty_curriculum(plan, self._domains)
        self._augmenter = _augmenter(plan, self._stores)

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
        if self._augmenter is not None:
            rows = self._augmenter.changed(rows, block.domain_index_R, block.epoch_R)
        return block, rows

    def share_of_rows(self, domain: int, share: float) -> float:
        """The share of a domain's rows that models write, so that they write a share of its loss
        tokens."""
        return self._lengths[domain].share_of_rows(share)

    def rows_drawn(self, step: int) -> np.ndarray:
        """Rows of each domain in all blocks before `step`, int64 [D]."""
        return self._ruled().rows_drawn(step)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """See `TokenSource`."""
        return self._ruled().epochs(steps)

    def facts(self) -> dict[str, Any]:
        """The size of every domain's text, and the order of its rows where phases have one."""
        domains = self._plan.domains
        rows: dict[str, Any] = {
            f"the text of {d.name}": [d.num_rows, d.num_loss_tokens] for d in domains
        }
        rows |= {f"the order of {d.name}": d.digest for d in self._domains if d.digest}
        if writes_pairs(self._plan.config.losses):
            rows |= {f"the pairs of {d.name}": digest_file(Path(d.train_path)) for d in domains}
        if self._augmenter is None:
            return rows
        left_out = None if self._augmenter.fills else FILLING  # which names what was filled
        changed = self._augmenter.section.model_dump(exclude=left_out)
        rows |= {f"augmentation.{name}": value for name, value in changed.items()}
        fills = zip(domains, self._augmenter.fills, strict=False)
        return rows | {f"the fills of {d.name}": found.digest for d, found in fills}

    def _ruled(self) -> Curriculum:
        """The curriculum under every entry read."""
        if len(self._curriculum.log.entries) < self._weight_log.num_entries:
            self._curriculum = self._curriculum.with_log(self._weight_log.read)
        return self._curriculum


def _augmenter(plan: RunPlan, stores: Sequence[RowStore]) -> Augmenter | None:
    """What changes documents of a run in training, where any are changed."""
    section = plan.config.augmentation
    if not section.applies or plan.mode != "train":
        return None
    fills: list[Fills] = []
    if section.fills:
        fills = [Fills.open(d.fills_path) for d in plan.domains if d.fills_path is not None]
        assert len(fills) == len(stores), "masks are filled by now"
    return Augmenter(section, stores, plan.config.seed, plan.special_ids, fills)


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


@dataclass(frozen=True, slots=True)
class Lengths:
    """Loss tokens of a domain's row in the mean."""

    written: float  # where a model writes it
    given: float  # in the data set

    def share_of_rows(self, share: float) -> float:
        """See `shared.data.rollouts.share_of_rows`."""
        return share_of_rows(share, written=self.written, given=self.given)


def _lengths(plan: RunPlan, stores: Sequence[RowStore]) -> tuple[Lengths, ...]:
    source, context = plan.config.source, plan.config.data.context
    return tuple(
        Lengths(expected_tokens(store, source, context=context), store.mean_loss_tokens)
        for store in stores
    )


def _partly_written(
    plan: RunPlan, domains: Sequence[DomainParts], lengths: Sequence[Lengths]
) -> tuple[DomainParts, ...]:
    """The domains with the loss tokens that their rows have where a part of them is written by
    models: the share at first, where it moves."""
    asked, found = plan.config.source.first_share, []
    for domain, length in zip(domains, lengths, strict=True):
        share = length.share_of_rows(asked)
        means = (share * length.written + (1 - share) * mean for mean in domain.mean_loss_tokens_P)
        found.append(replace(domain, mean_loss_tokens_P=tuple(means)))
    return tuple(found)


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

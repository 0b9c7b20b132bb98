"""What a rank trains on next: blocks drawn by the weights in force, the teacher asked ahead.

Units are submitted up to the prefetch depth ahead of the step under way, but never beyond the
last block whose weights are settled, so that neither prefetch nor a slow controller can change
what is drawn.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from shared.config import Config
from shared.domains import ControllerClient, WeightLog, decision_steps, known_through
from shared.errors import TutelageError
from shared.mixture import DomainSize, Mixture
from shared.plan import RunPlan
from shared.row_store import RowStore
from shared.soft_targets import SoftTargets, TargetReader
from student_trainer.batches import Shard, Step, draw_step
from student_trainer.ranks import Ranks


class Supply:
    """Steps in order, from any first step on, and the answers to their units."""

    def __init__(
        self,
        plan: RunPlan,
        stores: Sequence[RowStore],
        *,
        ranks: Ranks,
        reader: TargetReader | None,
        controller: ControllerClient | None,
    ) -> None:
        self._plan, self._config, self._ranks = plan, plan.config, ranks
        self._stores, self._reader, self._controller = stores, reader, controller
        self._shard = Shard(ranks.rank, ranks.world_size, plan.config.batch.micro_batch)
        self._mixture = _empty_mixture(plan)
        self._drawn: deque[Step] = deque()

    def step(self, index: int) -> Step:
        """Step `index`, drawn; asks the teacher about it and the steps ahead.

        Waits for the weights of the block itself where the controller has not decided them yet;
        those of the blocks ahead are looked for and not waited for.
        """
        ahead = min(self._config.steps - 1, index + self._config.prefetch_steps)
        self._learn_weights(through=index)
        while self._settled() < ahead and self._learn_entry(wait=False):
            pass
        through = min(ahead, self._settled())
        for block in self._missing(index, through):
            step = draw_step(self._mixture, self._stores, index=block, shard=self._shard)
            self._ask(step)
            self._drawn.append(step)
        return self._drawn.popleft()

    def targets(self) -> SoftTargets | None:
        """The answer to the oldest unit not answered yet; None where no loss needs a teacher.

        All ranks call it together: where one has no answer, all raise its error.
        """
        if self._reader is None or self._plan.target_spec is None:
            return None
        targets, error = None, None
        try:
            targets = self._reader.next()
        except TutelageError as failure:
            error = failure
        self._ranks.agree(error)
        return targets

    def weights(self, block: int) -> tuple[float, ...]:
        """The domain weights in force at a block already drawn."""
        return self._mixture.log.ruling(block).weights

    @property
    def num_weight_entries(self) -> int:
        """Length of the weight log as far as this run has read it."""
        return len(self._mixture.log.entries)

    def learn_decisions(self, *, before: int) -> None:
        """Read every entry that is decided from a report of a step before this one.

        A report lost with its controller is handed over again only by a run that has not passed
        its step, so a checkpoint waits for them.
        """
        due = sum(step < before for step in decision_steps(self._config))
        while self.num_weight_entries < due:
            self._learn_entry()

    def _missing(self, index: int, through: int) -> Iterator[int]:
        first = self._drawn[-1].index + 1 if self._drawn else index
        yield from range(first, through + 1)

    def _ask(self, step: Step) -> None:
        if self._reader is not None and self._plan.target_spec is not None:
            for rows in step.units:
                self._reader.submit(rows, self._plan.target_spec)

    def _settled(self) -> int:
        """The last block that can be drawn with the entries read so far."""
        entries = self._mixture.log.entries
        if not entries:
            return -1
        decided_at = decision_steps(self._config)[len(entries) - 1]
        return known_through(self._config.mixture, decided_at)

    def _learn_weights(self, *, through: int) -> None:
        """Read entries of the weight log until block `through` is settled."""
        while self._settled() < through:
            self._learn_entry()

    def _learn_entry(self, *, wait: bool = True) -> bool:
        """Read the next entry of the weight log, for which rank 0 asks; whether there was one."""
        index, entry, error = self.num_weight_entries, None, None
        if self._ranks.leads:
            assert self._controller is not None, "rank 0 has a controller"
            try:
                entry = self._controller.entry(index) if wait else self._controller.peek(index)
            except TutelageError as failure:
                error = failure
        entry, error = self._ranks.from_leader((entry, error))  # type: ignore[misc]
        if error is not None:
            raise error
        assert entry is not None or not wait, "the controller answers or raises"
        if entry is not None:
            self._mixture = self._mixture.with_log(self._mixture.log.appended(entry))
        return entry is not None


def _empty_mixture(plan: RunPlan) -> Mixture:
    config: Config = plan.config
    sizes = [
        DomainSize(d.name, d.num_rows, d.num_loss_tokens / max(1, d.num_rows)) for d in plan.domains
    ]
    return Mixture(
        seed=config.seed,
        domains=sizes,
        rows_per_block=config.batch.rows_per_step,
        log=WeightLog(tuple(d.name for d in plan.domains), ()),
    )

"""What a rank trains on next: blocks drawn by the weights in force, the teacher asked ahead.

Units are submitted up to the prefetch depth ahead of the step under way, but never beyond the
last block whose weights are settled, so that neither prefetch nor a slow controller can change
what is drawn. Where the student names ids to ask about, that depth is 0.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.data.row_store import RowStore
from shared.errors import TutelageError
from shared.mixture.curriculum import Curriculum, DomainParts, parts_of, whole_domain
from shared.mixture.decisions import known_through
from shared.mixture.weight_log import ControllerClient, WeightEntry, WeightLog
from shared.run.plan import RunPlan
from shared.targets.routing import Answer, RunReader
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Shard, Step, draw_step
from student_trainer.sources.student_ids import StudentIds


class Supply:
    """Steps in order, from any first step on, and the answers to their units."""

    def __init__(
        self,
        plan: RunPlan,
        stores: Sequence[RowStore],
        *,
        ranks: Ranks,
        reader: RunReader | None,
        controller: ControllerClient | None,
        student_ids: StudentIds | None = None,
    ) -> None:
        assert student_ids is None or plan.config.prefetch_steps == 0, "its weights would be old"
        self._student_ids = student_ids
        self._plan, self._config, self._ranks = plan, plan.config, ranks
        self._stores, self._reader, self._controller = stores, reader, controller
        self._shard = Shard(ranks.rank, ranks.world_size, plan.config.batch.micro_batch)
        self.domains = _parts(plan, stores)
        self._curriculum = empty_curriculum(plan, self.domains)
        self._drawn: deque[Step] = deque()

    def step(self, index: int) -> Step:
        """Step `index`, drawn; asks the teacher about it and the steps ahead.

        Waits for the weights of the block itself where the controller has not decided them yet;
        those of the blocks ahead are looked for and not waited for.
        """
        ahead = index + self._config.prefetch_steps
        self._learn_weights(through=index)
        while self._settled() < min(ahead, self._end() - 1) and self._learn_entry(wait=False):
            pass
        through = min(ahead, self._end() - 1, self._settled())
        for block in self._missing(index, through):
            step = draw_step(
                self._curriculum,
                self._stores,
                index=block,
                shard=self._shard,
                draws=self._plan.draws,
            )
            self._ask(step)
            self._drawn.append(step)
        return self._drawn.popleft()

    def targets(self) -> Answer | None:
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

    def ruling(self, block: int) -> WeightEntry:
        """The entry in force at a block already drawn."""
        return self._curriculum.log.ruling(block)

    def epochs(self, step: int) -> tuple[float, ...]:
        """How often each domain's rows were gone through in the first `step` blocks."""
        return self._curriculum.epochs(step)

    def is_over(self, step: int) -> bool:
        """Whether training ends after `step` updates. All ranks ask together.

        Where a decision may say so, its entry is waited for: the next block would need it too.
        """
        if 0 < step < self._config.steps and self._config.stop_ratio is not None:
            # Without a lag the entry of a decision at this very step may not be asked for yet.
            self._learn_weights(through=step if self._config.mixture.lag_steps else step - 1)
        return step >= self._end()

    @property
    def num_weight_entries(self) -> int:
        """Length of the weight log as far as this run has read it."""
        return len(self._curriculum.log.entries)

    def learn_decisions(self, *, before: int) -> None:
        """Read every entry that is decided from a report of a step before this one.

        A report lost with its controller is handed over again only by a run that has not passed
        its step, so a checkpoint waits for them.
        """
        due = sum(step < before for step in self._config.decision_steps)
        while self.num_weight_entries < due and not self._stops:
            self._learn_entry()

    def _missing(self, index: int, through: int) -> Iterator[int]:
        first = self._drawn[-1].index + 1 if self._drawn else index
        yield from range(first, through + 1)

    def _ask(self, step: Step) -> None:
        if self._reader is not None and self._plan.target_spec is not None:
            own = self._student_ids
            for rows in step.units if own is None else own.named(step.units):
                self._reader.submit(rows, self._plan.target_spec)

    def _settled(self) -> int:
        """The last block that can be drawn with the entries read so far."""
        entries = self._curriculum.log.entries
        if not entries:
            return -1
        decided_at = self._config.decision_steps[len(entries) - 1]
        return known_through(self._config, decided_at)

    @property
    def _stops(self) -> bool:
        """Whether the last entry read ends training, so that no other follows."""
        entries = self._curriculum.log.entries
        return bool(entries) and entries[-1].stop

    def _end(self) -> int:
        """Steps of the run, as far as the entries read say."""
        return self._curriculum.log.end(self._config.steps)

    def _learn_weights(self, *, through: int) -> None:
        """Read entries of the weight log until block `through`, or the last one, is settled."""
        while self._settled() < min(through, self._end() - 1):
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
            self._curriculum = self._curriculum.with_log(self._curriculum.log.appended(entry))
        return entry is not None


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

"""`tutelage capture`: ask a teacher everything that a run will ask, and keep the answers.

With the teacher alone: no student trains. Rows that are stored are not asked again, so the same
command continues, and a run under way or another capture may fill the same store.
"""

import sys
import tempfile
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from cluster.launch.repeating import Again, Widest
from cluster.launch.teachers.serving import asking
from cluster.planning.keeping import budget_note, kept_in_store
from cluster.planning.preparation import Launch, prepare_run
from cluster.planning.tasks.classes import refuse_without_run
from cluster.report.text import text_lines, text_of
from cluster.session.interrupts import interrupted_as
from cluster.session.placement import refuse_unplaceable_here, teachers_demands
from cluster.session.services import reached, services_of
from cluster.session.session import connected, prepare_environment
from shared.config.adaptive_losses import writes_pairs
from shared.config.mixture import FixedMixture
from shared.config.run import Config
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.data.teacher_rows import TeacherRows
from shared.errors import ConfigError
from shared.loading import in_int8
from shared.mixture.curriculum import Curriculum
from shared.mixture.decisions import first_entry
from shared.prompts.prefix import shown
from shared.run.plan import OpenReader, RunPlan
from shared.run.run_dir import RunDir
from shared.store.answer_files import Holding
from shared.store.target_store import TargetStore
from shared.targets.question import Question
from shared.targets.reader import TargetReader, answered
from shared.text.sources import Split
from student_trainer.evaluation.validation import unit_size
from student_trainer.sources.data_set import empty_curriculum, whole_domains

UNITS_PER_REPLICA = 2  # under way, so that a replica never waits for the next
KEPT_INSTEAD = "those over targets.top_k and the tail are kept"  # where all do not fit
INTERRUPTED = "Interrupted; what was answered is stored, and the same command goes on."
SAID_EVERY_S = 60.0  # where there is no terminal for a bar


@dataclass(slots=True)
class Captured:
    """What a capture did and what is stored now."""

    training: Holding | None  # None: no loss asks a teacher
    validation: Holding
    asked_rows: int  # rows that were not stored before
    asked_tokens: int  # positions with loss of them
    seconds: float  # of asking
    again: Again  # the same documents scored alone

    def lines(self) -> str:
        """For the terminal."""
        parts = {"training": self.training, "validation": self.validation}
        said = [f"{name:<11}{held.in_words()}" for name, held in parts.items() if held]
        rate = self.asked_tokens / max(self.seconds, 1e-9)
        said.append(
            f"asked {self.asked_rows:,} rows, {self.asked_tokens:,} tokens, in "
            f"{self.seconds:.1f} s, {rate:,.0f} tokens/s; {self.again.in_words()}"
        )
        return "\n".join(said)


def capture(
    config: Config,
    *,
    service: str | None = None,
    address: str | None = None,
    all_rows: bool = False,
) -> dict[str, Captured]:
    """Fill `targets.store` of a resolved config, teacher by teacher: the rows that its steps draw
    where weights are fixed, else or with `all_rows` every row, and the validation rows.

    Raises UserErrors before anything starts and TutelageErrors later; what was answered stays.
    """
    store = _store_of(config)
    _refuse_changed_text(config)
    refuse_without_run(config, "a capture")
    prepare_environment()
    config = _for_teachers_alone(config)
    services = services_of(config, service)
    with (
        tempfile.TemporaryDirectory(prefix="tutelage-capture-") as folder,
        interrupted_as(lambda: INTERRUPTED),
        reached(address, services),
    ):
        if services is None:
            _refuse_unplaceable(config)
        prepared = prepare_run(config)
        print(
            "\n".join(text_lines(text_of(config, prepared.domains, notes=prepared.showing.notes))),
            flush=True,
        )
        with connected(address):
            if note := budget_note(prepared, instead=KEPT_INSTEAD):
                print(note, flush=True)
            prepared = kept_in_store(prepared)
            launch = Launch(prepared, RunDir(Path(folder) / config.name), Path(folder), services)
            if services is None:
                _refuse_unplaceable(config)
            with asking(launch) as (plan, live):
                return {
                    name: _captured(plan, name, live[name], store, all_rows=all_rows)
                    for name in live
                }


def _captured(
    plan: RunPlan, teacher: str, live: OpenReader, store: str, *, all_rows: bool
) -> Captured:
    """One teacher's part."""
    if plan.parts:
        print(f"asking {teacher}", flush=True)
    reader = live(0)
    try:
        capture = Capture(plan, teacher, store, reader, ahead=2 * plan.config.service.in_flight)
        return capture.all(all_rows=all_rows)
    finally:
        reader.close()


def _for_teachers_alone(config: Config) -> Config:
    """The config with live teachers and units enough under way for every replica of each."""
    replicas = max(teacher.most for teacher in config.teachers.values())
    under_way = max(config.service.in_flight, UNITS_PER_REPLICA * replicas)
    return config.model_copy(
        update={
            "targets": config.targets.model_copy(update={"teacher_free": False}),
            "service": config.service.model_copy(update={"in_flight": under_way}),
        }
    )


def captures_all_rows(config: Config) -> bool:
    """Whether a run of this config may ask about any row: its draws depend on what is learnt."""
    return not isinstance(config.mixture, FixedMixture) or config.progressive is not None


def training_units(plan: RunPlan, *, all_rows: bool) -> Iterator[Rows]:
    """Units of the rows that a run asks about, each row once, in the order of the run where its
    order is known, else domain by domain. Where ids are drawn, each row once for every draw."""
    config, stores = plan.config, [RowStore.open(d.train_path) for d in plan.domains]
    size = config.batch.micro_batch
    draws = plan.draws
    if all_rows or captures_all_rows(config):
        for draw, store in product(range(draws), stores):
            for rows in store.units(size):
                yield rows.with_draws(np.full(len(rows), draw)) if draw else rows
        return
    curriculum = _curriculum(plan)
    taken = [np.zeros((len(store), draws), bool) for store in stores]
    for index in range(config.steps):
        block = curriculum.block(index)
        columns = (block.domain_index_R, block.row_index_R, block.epoch_R % draws)
        asked = list(zip(*(column.tolist() for column in columns), strict=True))
        for first in range(0, len(asked), size):
            new = [(d, r, n) for d, r, n in asked[first : first + size] if not taken[d][r, n]]
            for domain, row, number in new:
                taken[domain][row, number] = True
            if new := list(dict.fromkeys(new)):
                domains, rows, numbers = zip(*new, strict=True)
                unit = take_rows(stores, domains, rows)
                yield unit.with_draws(np.array(numbers)) if any(numbers) else unit
        if all(each.all() for each in taken):
            return


@dataclass(slots=True)
class Capture:
    """A capture under way: the run's plan, one of its teachers, and a reader of it past any store
    and without prompts."""

    run: RunPlan
    teacher: str
    store: str
    reader: TargetReader
    ahead: int  # units asked beyond the one waited for
    rows: int = 0  # asked
    tokens: int = 0  # of them
    again: Again = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.again = Again(in_int8=in_int8(self.plan.teacher or {}))

    def all(self, *, all_rows: bool) -> Captured:
        """Training rows, then validation rows."""
        plan, config, training = self.plan, self.run.config, None
        assert plan.validation_question is not None, "there is a teacher"
        if plan.training_question is not None:
            total = plan.draws * sum(d.num_loss_tokens for d in plan.domains)
            if not (all_rows or captures_all_rows(config)):
                total = _drawn_tokens(self.run, plan.config.domains)
            units = self._read("train", self._own(training_units(self.run, all_rows=all_rows)))
            training = self.fill(units, plan.training_question, name="training", total=total)
        size = unit_size(config.batch.micro_batch, plan.validation_question)
        stores = [RowStore.open(d.validation_path) for d in plan.domains]
        units = (unit for store in stores for unit in store.units(size))
        units = self._read("validation", units)
        total = sum(store.num_loss_tokens for store in stores)
        validation = self.fill(units, plan.validation_question, name="validation", total=total)
        seconds = time.monotonic() - self.started
        return Captured(training, validation, self.rows, self.tokens, seconds, self.again)

    @property
    def plan(self) -> RunPlan:
        """What the teacher is asked."""
        return self.run.by_teacher[self.teacher]

    def _own(self, units: Iterator[Rows]) -> Iterator[Rows]:
        """The rows of units that the teacher teaches."""
        domains = self.plan.config.domains
        for rows in units:
            if len(own := rows.where([name in domains for name in rows.domains()])):
                yield own

    def _read(self, split: Split, units: Iterator[Rows]) -> Iterator[Rows]:
        """The units as the teacher reads them."""
        own = TeacherRows.open(self.plan.domains, split)
        return units if own is None else map(own.of, units)

    def fill(self, units: Iterator[Rows], spec: Question, *, name: str, total: int) -> Holding:
        """Ask about the rows of units that are not stored."""
        store, progress = self._opened(spec), _Progress(name, total)
        sent, ahead = Widest(shown(unit, self.plan.openings) for unit in units), self.ahead
        try:
            missing = _missing(store, sent, ahead=ahead, progress=progress)
            for rows, answer in answered(self.reader, missing, spec, ahead=ahead):
                store.write(answer)
                tokens = int(rows.num_loss_tokens().sum())
                self.rows += len(rows)
                self.tokens += tokens
                progress.add(tokens)
            self.again = self.again.with_unit(sent.unit, store, self.reader, spec)
        finally:
            progress.close()
            store.close()
        return store.holding()

    def _opened(self, spec: Question) -> TargetStore:
        plan = self.plan
        assert plan.teacher is not None, "there is a teacher"
        ids = plan.config.targets.store_ids
        return TargetStore(
            self.store, teacher=plan.teacher, question=spec, ids=ids, sets_aside=True
        )


class _Progress:
    """A bar over the tokens still to be asked about, or a line now and then."""

    def __init__(self, name: str, total: int) -> None:
        on_terminal = sys.stderr.isatty()
        self._name, self._done, self._started = name, 0, time.monotonic()
        self._said = self._started
        self._bar = tqdm(
            total=total, desc=name, unit=" tokens", unit_scale=True, disable=not on_terminal
        )
        self._total = total
        self._speaks = not on_terminal

    def skip(self, tokens: int) -> None:
        """Tokens that are stored or asked already, so that rate and rest are of the others."""
        self._total = max(self._done, self._total - tokens)
        self._bar.total = self._total

    def add(self, tokens: int) -> None:
        """Tokens that have been answered and stored."""
        self._done += tokens
        self._bar.update(tokens)
        now = time.monotonic()
        if self._speaks and now - self._said > SAID_EVERY_S:
            self._said = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            print(
                f"{self._name}: {self._done:,} of {self._total:,} tokens, {rate:,.0f} tokens/s, "
                f"{left / 60:.1f} min left",
                flush=True,
            )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def _refuse_changed_text(config: Config) -> None:
    """Raise ConfigError where documents are changed anew in every epoch, or written in pairs."""
    if writes_pairs(config.losses):
        raise ConfigError(
            "losses has a preference whose pairs teacher and student write before a run, so that "
            "capture cannot know them; let a run fill targets.store, or set pairs=given"
        )
    if config.augmentation.applies:
        raise ConfigError(
            f"augmentation.share is {config.augmentation.share:g}, which changes documents anew in "
            "every epoch, so that capture cannot know them; let a run fill targets.store, or leave "
            "augmentation out"
        )


def _store_of(config: Config) -> str:
    """The config's store. Raises ConfigError where it has none."""
    if config.targets.store is None:
        raise ConfigError(
            "targets.store is not set, and capture writes the answers there; set "
            "targets.store=FOLDER"
        )
    if not config.source.is_dataset:
        raise ConfigError(
            f"source has {config.source.written_in_words}, and what models write is not there "
            "before it is learnt, so that no capture can ask about it; run with targets.store, "
            "which keeps the answers as they come, or set source=dataset"
        )
    return config.targets.store


def _refuse_unplaceable(config: Config) -> None:
    refuse_unplaceable_here(partial(teachers_demands, config.teachers))


def _missing(
    store: TargetStore, units: Iterable[Rows], *, ahead: int, progress: _Progress
) -> Iterator[Rows]:
    """Rows of each unit that are neither stored nor under way, where there are some; of the units
    handed out, all but the last `ahead` + 1 are stored."""
    under_way: deque[list[bytes]] = deque(maxlen=ahead + 1)
    for rows in units:
        keys, known = rows.hashes(), {key for unit in under_way for key in unit}
        new = [row for row, key in enumerate(keys) if key not in known and key not in store]
        left = Rows(rows.table.take(pa.array(new, pa.int64())))
        progress.skip(int(rows.num_loss_tokens().sum() - left.num_loss_tokens().sum()))
        if len(left):
            under_way.append([keys[row] for row in new])
            yield left


def _curriculum(plan: RunPlan) -> Curriculum:
    """The draws of a run under fixed weights, as its controller settles them."""
    config, names = plan.config, tuple(domain.name for domain in plan.domains)
    assert isinstance(config.mixture, FixedMixture), "weights that move are not known"
    weights = config.mixture.shares({d.name: d.natural_weight for d in plan.domains})
    entry = first_entry(weights, factors=None, report=None, domains=names)
    empty = empty_curriculum(plan, whole_domains(plan))
    return empty.with_log(empty.log.appended(entry))


def _drawn_tokens(plan: RunPlan, domains: Container[str]) -> int:
    """Loss tokens of the rows that a run takes of some domains, each once for every draw; from the
    mean of its domain."""
    epochs = _curriculum(plan).epochs(plan.config.steps)
    pairs = zip(epochs, plan.domains, strict=True)
    return round(sum(min(plan.draws, n) * d.num_loss_tokens for n, d in pairs if d.name in domains))

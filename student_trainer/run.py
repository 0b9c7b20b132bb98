"""Run: the parts that a rank trains with, built once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.data.teacher_rows import TeacherRows
from shared.errors import TutelageError
from shared.mixture.weight_log import ControllerClient
from shared.run.plan import OpenController, OpenRunReader, RunPlan
from shared.run.run_dir import RunDir
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.generation import OpenGenerator, OpenTeachers
from shared.targets.lessons import OpenModules
from shared.targets.routing import RunReader
from student_trainer.accelerator import join, this_device
from student_trainer.balance import ModalityBalance, open_balance
from student_trainer.engine import open_engine
from student_trainer.evaluation.validation import Validation
from student_trainer.metrics.accumulator import (
    MetricsAccumulator,
    ReportAccumulator,
    RolloutAccumulator,
)
from student_trainer.models.frozen import FrozenWeights, base_digest, frozen_weights
from student_trainer.models.image_text import ImageTextStudent
from student_trainer.models.student import LoadStudent, Student
from student_trainer.models.teacher_head import TeacherHeads, load_teacher_heads
from student_trainer.models.writing import copied_for_writing
from student_trainer.objective import Objective
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Layouts
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.followed_student import FOLLOWED, FollowedVersions, open_followed
from student_trainer.sources.generated.rollouts import ADAPTIVE, Rollouts, open_rollouts
from student_trainer.sources.generated.writers import open_writer
from student_trainer.sources.loader import Loader
from student_trainer.sources.online_teacher import MODULES, OnlineTeacher, open_online_teacher
from student_trainer.sources.source import MovingTeacher, OpenSource, TokenSource
from student_trainer.sources.student_ids import StudentIds
from student_trainer.state.export import Reloader
from student_trainer.state.stateful import Stateful
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.task import Task
from student_trainer.tracking.trackers import Trackers
from student_trainer.weighing.taid import TAIDState
from student_trainer.weighing.weighting import Weighting
from student_trainer.weighing.weightings import weighting_of


@dataclass(slots=True)
class Run:
    """Everything a rank holds while it trains."""

    plan: RunPlan
    task: Task
    ranks: Ranks
    student: Student
    engine: Any  # a DeepSpeed engine around the Objective
    base: str | None  # hash of the whole base of a student with adapters
    frozen: FrozenWeights | None  # of a student with adapters
    layouts: Layouts
    weight_log: FollowedLog
    source: TokenSource
    loader: Loader
    validation: Validation
    metrics: MetricsAccumulator
    since_report: ReportAccumulator
    rollouts: RolloutAccumulator
    taid: TAIDState
    weighting: Weighting | None  # what positions count, where not all count alike
    online: OnlineTeacher | None  # whose modules learn beside the student
    followed: FollowedVersions | None  # of the student, which its teacher is
    balance: ModalityBalance | None  # of the parts of a student that sees
    stateful: Mapping[str, Stateful]  # by the name under which checkpoints keep it
    reader: RunReader | None
    controller: ControllerClient | None  # on rank 0
    reloader: Reloader | None = None  # on rank 0, towards the end
    trackers: Trackers | None = None  # on rank 0, in training

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.plan.config

    @property
    def files(self) -> RunDir:
        """Where the run writes."""
        return RunDir(Path(self.plan.run_dir))

    @property
    def decisions(self) -> range:
        """Steps before which the controller is told how the student does."""
        return self.config.decision_steps

    def is_over(self, step: int) -> bool:
        """Whether training ends after `step` updates; all ranks ask together."""
        return self.weight_log.is_over(step)

    def settle(self) -> None:
        """Wait until what is drawn is written, on all ranks together, and count what that took."""
        self.loader.settle()
        if isinstance(self.source, Rollouts):
            self.rollouts.effort += self.source.take_effort()

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return step % every == 0 or self.is_over(step)


class _Measured(TypedDict):
    """What a run measures and follows, by the names of `Run`."""

    metrics: MetricsAccumulator
    since_report: ReportAccumulator
    rollouts: RolloutAccumulator
    taid: TAIDState
    weighting: Weighting | None


def open_run(
    plan: RunPlan,
    open_reader: OpenRunReader | None,
    open_controller: OpenController,
    *,
    open_source: OpenSource = DataSet,
    task: Task = CAUSAL_LM,
    load: LoadStudent | None = None,
    open_generator: OpenGenerator | None = None,
    open_teachers: OpenTeachers | None = None,
    open_modules: OpenModules | None = None,
) -> Run:
    """Join the other ranks, load the student and build everything a run needs.

    `open_reader` is None where nothing is asked of a teacher, `open_generator` where the student
    does not write, `open_teachers` where no teacher does and `open_modules` where none has modules
    that learn. Raises what `Task.load` raises, on all ranks together.
    """
    config, loaded = plan.config, _loaded(plan, load or task.load)
    student, ranks = loaded.student, loaded.ranks
    layouts = _layouts(plan, loaded.device, task)
    reader = open_reader(ranks.rank) if open_reader is not None else None
    controller = open_controller() if ranks.leads else None
    engine = open_engine(loaded.objective, config, _sides(config, student, loaded.objective))
    balance = open_balance(config.optimiser.balance, student, engine, ranks)
    weight_log = FollowedLog(config, ranks, controller)
    rows = open_source(plan, ranks, weight_log)
    source = _written(rows, plan, loaded, engine, open_generator, open_teachers)
    online = open_online_teacher(plan, engine, layouts, ranks, open_modules=open_modules)
    followed = open_followed(plan, student, engine, ranks)
    measured = _measured(plan, loaded, num_teachers=len(plan.parts) if reader else 0)
    return Run(
        plan=plan,
        task=task,
        ranks=ranks,
        student=student,
        engine=engine,
        base=loaded.base,
        frozen=frozen_weights(student, engine.module, ranks),
        layouts=layouts,
        weight_log=weight_log,
        source=source,
        loader=_loader(
            plan, source, weight_log, ranks, reader, layouts, engine, online or followed
        ),
        validation=_validation(plan, layouts, ranks),
        **measured,
        online=online,
        followed=followed,
        balance=balance,
        stateful=_stateful(measured, config, source, online, followed, balance),
        reader=reader,
        controller=controller,
    )


def _sides(config: Config, student: Student, objective: Objective) -> dict[str, str] | None:
    """The side of every trained weight, where sides are kept in step."""
    if config.optimiser.balance is None:
        return None
    assert isinstance(student, ImageTextStudent), "the config says that it sees"
    return student.sides(objective)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a rank has before the student is sharded."""

    device: torch.device
    ranks: Ranks
    student: Student
    objective: Objective
    base: str | None  # see `Run`
    written_by: nn.Module | None  # what this rank writes with; None where others write


def _loaded(plan: RunPlan, load: LoadStudent) -> _Loaded:
    """Join the other ranks and load the student; makes the run's folders."""
    device = this_device()
    join(device)
    ranks = Ranks()
    student, heads = _load_together(plan, device, ranks, load)
    width = plan.teacher_width
    objective = Objective(student, plan.config, teacher_width=width, teacher_heads=heads).to(device)
    base = ranks.from_leader(base_digest(student) if ranks.leads else None)
    _make_folders(RunDir(Path(plan.run_dir)))
    return _Loaded(device, ranks, student, objective, base, _written_by(plan, student))


def _layouts(plan: RunPlan, device: torch.device, task: Task) -> Layouts:
    names = tuple(plan.config.domains)
    return Layouts(names, plan.packed, device, task, plan.passes, task.pairing(plan))


def _loader(
    plan: RunPlan,
    source: TokenSource,
    weight_log: FollowedLog,
    ranks: Ranks,
    reader: RunReader | None,
    layouts: Layouts,
    engine: Any,
    moving: MovingTeacher | None,
) -> Loader:
    return Loader(
        source,
        weight_log,
        ranks=ranks,
        domains=tuple(plan.config.domains),
        reader=reader,
        question=plan.training_question,
        student_ids=_student_ids(plan, engine, layouts),
        moving=moving,
        waiting=source.waiting if isinstance(source, Rollouts) else None,
        in_turn=isinstance(source, Rollouts) and source.in_turn,
        teacher_rows=TeacherRows.open(plan.domains, "train"),
    )


def _validation(plan: RunPlan, layouts: Layouts, ranks: Ranks) -> Validation:
    stores = tuple(RowStore.open(domain.validation_path) for domain in plan.domains)
    own = TeacherRows.open(plan.domains, "validation")
    return Validation(stores, layouts, ranks, plan.config.batch.micro_batch, own)


def _make_folders(files: RunDir) -> None:
    for folder in (files.logs, files.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)


def _written_by(plan: RunPlan, student: Student) -> nn.Module | None:
    """See `_Loaded`."""
    config = plan.config
    if plan.mode != "train" or not config.source.writes or config.rollouts.serves:
        return None
    return copied_for_writing(student.saved, zero=config.student.zero)


def _written(
    rows: TokenSource,
    plan: RunPlan,
    loaded: _Loaded,
    engine: Any,
    open_generator: OpenGenerator | None,
    open_teachers: OpenTeachers | None,
) -> TokenSource:
    """Rows as they are, or with what models answer to some where they write."""
    source = plan.config.source
    if plan.mode != "train" or source.is_dataset:
        return rows
    writer = None
    if source.writes:
        writer = open_writer(
            plan,
            open_generator,
            student=loaded.student,
            engine=engine,
            ranks=loaded.ranks,
            model=loaded.written_by,
        )
    return open_rollouts(rows, plan, loaded.ranks, writer=writer, open_teachers=open_teachers)


def _measured(plan: RunPlan, loaded: _Loaded, *, num_teachers: int) -> _Measured:
    """Everything at its beginning."""
    ranks, layout = loaded.ranks, loaded.objective.loss_head.layout
    return _Measured(
        metrics=MetricsAccumulator(ranks, layout, num_teachers=num_teachers),
        since_report=ReportAccumulator(layout),
        rollouts=RolloutAccumulator(ranks, plan.ends),
        taid=TAIDState.start(plan.config.taid),
        weighting=weighting_of(
            plan.config, num_domains=layout.num_domains, scored_centre=plan.scored_centre
        ),
    )


def _stateful(
    measured: _Measured,
    config: Config,
    source: TokenSource,
    online: OnlineTeacher | None,
    followed: FollowedVersions | None,
    balance: ModalityBalance | None,
) -> dict[str, Stateful]:
    """The parts that checkpoints keep, by the names that they have there."""
    written: dict[str, Stateful] = {"rollouts": measured["rollouts"]}
    if isinstance(source, Rollouts) and source.adaptive is not None:
        written[ADAPTIVE] = source.adaptive
    weighting = measured["weighting"]
    return {
        "interval": measured["metrics"],
        "since_report": measured["since_report"],
        "interpolation": measured["taid"],
        **({} if weighting is None else {"weighting": weighting}),
        **({} if config.source.is_dataset else written),
        **({} if online is None else {MODULES: online}),
        **({} if followed is None else {FOLLOWED: followed}),
        **({} if balance is None else {"balance": balance}),
    }


def _student_ids(plan: RunPlan, engine: Any, layouts: Layouts) -> StudentIds | None:
    """What names ids of the student for the teacher, where it is asked about any."""
    ask = plan.training_question and plan.training_question.ask
    if isinstance(ask, LikeliestIds) and ask.student_ids:
        return StudentIds(engine, layouts, ask)
    return None


def close_run(run: Run) -> None:
    """Let go of the teacher, of those who write, and of the engine."""
    if run.reader is not None:
        run.reader.close()
    written = run.source if isinstance(run.source, Rollouts) else None
    for part in (run.reloader, run.trackers, written, run.loader, run.online):
        if part is not None:
            part.close()
    run.engine.destroy()


def _load_together(
    plan: RunPlan, device: Any, ranks: Ranks, load: LoadStudent
) -> tuple[Student, TeacherHeads]:
    student, teacher_heads, error = None, {}, None
    try:
        student = load(plan.config, device=device)
        teacher_heads = load_teacher_heads(plan, device)
    except TutelageError as failure:
        error = failure
    ranks.agree(error)
    assert student is not None, "an error would have been raised"
    return student, teacher_heads

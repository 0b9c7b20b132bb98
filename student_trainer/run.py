"""Run: the parts the loop names, built once, and the few things that happen now and then.

G domains in config order
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.errors import StorageError, TutelageError
from shared.mixture.weight_log import ControllerClient, DomainReport, read_log
from shared.run.metrics import DomainEvaluation, append_metrics
from shared.run.plan import OpenController, OpenReader, RunPlan
from shared.run.run_dir import RunDir, write_atomically
from shared.targets.reader import ReaderStats, TargetReader
from student_trainer.accelerator import join, this_device
from student_trainer.accumulator import Interval, SinceReport, metrics_line, progress_line
from student_trainer.engine import open_engine
from student_trainer.evaluate import Validation, ValidationSums
from student_trainer.losses.kernel.teacher_states import TeacherHead
from student_trainer.models.frozen import FrozenWeights, frozen_weights, refuse_changed
from student_trainer.models.student import Student, load_student
from student_trainer.models.teacher_head import load_teacher_head
from student_trainer.objective import TOTALS, Objective
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Layouts, Step
from student_trainer.sources.loader import Supply
from student_trainer.sources.student_ids import StudentIds
from student_trainer.state.checkpoint import (
    CHECKPOINT_FORMAT,
    latest_checkpoint,
    read_state,
    refuse_changes,
    step_of,
)
from student_trainer.state.export import export_checkpoint, exported_step
from student_trainer.state.shards import load_shards, write_checkpoint
from student_trainer.weighing.taid import Interpolation

log = logging.getLogger(__name__)
EVALUATIONS = "evaluations.json"
ONE_EVALUATION = "evaluation.json"


@dataclass(slots=True)
class Run:
    """Everything a rank holds while it trains."""

    plan: RunPlan
    ranks: Ranks
    student: Student
    engine: Any  # a DeepSpeed engine around the Objective
    frozen: FrozenWeights | None  # of a student with adapters
    layouts: Layouts
    supply: Supply
    validation: Validation
    interval: Interval
    since_report: SinceReport
    interpolation: Interpolation
    reader: TargetReader | None
    controller: ControllerClient | None  # on rank 0

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.plan.config

    @property
    def files(self) -> RunDir:
        """Where the run writes."""
        return RunDir(Path(self.plan.run_dir))

    @property
    def reader_stats(self) -> ReaderStats | None:
        """Counters of this rank's reader."""
        return None if self.reader is None else self.reader.stats

    @property
    def decisions(self) -> range:
        """Steps before which the controller is told how the student does."""
        return self.config.decision_steps

    def is_over(self, step: int) -> bool:
        """Whether training ends after `step` updates; all ranks ask together."""
        return self.supply.is_over(step)

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return step % every == 0 or self.is_over(step)

    def restore(self) -> int:
        """Load the newest whole checkpoint; returns the updates done, 0 for a fresh run.

        Raises CheckpointError where the run's shape has changed since.
        """
        checkpoint = self._latest()
        if checkpoint is None:
            return 0
        state = read_state(checkpoint)
        refuse_changes(checkpoint, found=state["facts"], asked=self._facts())
        load_shards(self.engine, checkpoint)
        self.interval = Interval.from_state(state["interval"], self.ranks)
        self.since_report = SinceReport.from_state(state["since_report"])
        self.interpolation = Interpolation.from_state(state["interpolation"])
        if self.ranks.leads:
            log.info("resuming from %s", checkpoint.name)
        return step_of(checkpoint)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, unless it is there; the weight log is as far by then."""
        self.supply.learn_decisions(before=step)
        state = {
            "step": step,
            "weight_entries": self.supply.num_weight_entries,
            "interval": self.interval.state(self.ranks),
            "since_report": self.since_report.state(),
            "interpolation": self.interpolation.state(),
            "facts": self._facts(),
            "frozen_weights": self.frozen and self.frozen.facts(),
        }
        write_checkpoint(
            self.engine,
            self.student,
            folder=self.files.checkpoints,
            step=step,
            state=state,
            keep=self.config.checkpoints.keep,
            ranks=self.ranks,
        )

    def move_target(self, drawn: Step, sums: np.ndarray) -> None:
        """Let TAID's target follow a step's loss; `sums` are those of all ranks, on every rank."""
        term = self.config.taid
        if term is None or not drawn.tokens:
            return
        loss = float(sums[len(TOTALS) + self.config.losses.index(term)]) / drawn.tokens
        self.interpolation = self.interpolation.after(
            loss, term, step=drawn.index, steps=self.config.steps
        )

    def report(self, step: int) -> None:
        """Tell the controller how the student does, as its policy needs; rank 0 alone talks."""
        config = self.config
        if config.decision_interval is None or not (step or config.mixture.opens_with_report):
            return
        sums = self.validation.sums(self.engine) if config.decides_from_validation else None
        error = None
        if self.ranks.leads:
            assert self.controller is not None, "rank 0 has a controller"
            try:
                self.controller.observe(self._domain_report(step, sums))
            except TutelageError as failure:
                error = failure
        self.ranks.agree(error)
        self.since_report = SinceReport.empty(len(self.config.domains))

    def evaluate(self, when: str) -> None:
        """Compare student and teacher on validation text, once per run for `before` and `after`."""
        written = self._evaluations() if self.ranks.leads else {}
        if self.ranks.from_leader(when in written):
            return
        found = self._evaluated()
        if self.ranks.leads:
            written[when] = {name: asdict(value) for name, value in found.items()}
            write_atomically(self.files.path / EVALUATIONS, json.dumps(written, indent=1))

    def evaluate_only(self) -> None:
        """Evaluate the student as it is and write `evaluation.json`."""
        found = self._evaluated()
        if self.ranks.leads:
            values = {name: asdict(value) for name, value in found.items()}
            write_atomically(self.files.path / ONE_EVALUATION, json.dumps(values, indent=1))

    def write_line(self, step: int, *, lr: float, grad_norm: float) -> None:
        """One line of metrics for programs and one for people; then start the next interval."""
        machine = self.ranks.sum(self.interval.machine)
        machine[:2] /= self.ranks.world_size  # seconds and waiting are means, the rest are sums
        line = metrics_line(
            self.interval,
            self.config,
            step=step,
            lr=lr,
            grad_norm=grad_norm,
            entry=self.supply.ruling(step - 1),
            epochs=self.supply.epochs(step),
            teacher_share=self.interpolation.teacher_share,
            machine=machine,
        )
        error = None
        if self.ranks.leads:
            done = step - _line_before(step, self.config)
            try:
                append_metrics(self.files.metrics, line)
                self._say(progress_line(line, self.config, steps_in_line=done))
            except OSError as failure:
                error = StorageError(
                    f"the line of step {step} cannot be written in {self.files.path}: "
                    f"{failure.strerror}; free some space and run the same command again, it "
                    "resumes from the last checkpoint"
                )
        self.ranks.agree(error)
        self.interval = _empty_interval(self.config)

    def say_stopped(self, step: int) -> None:
        """Tell people where training ended before its last step."""
        if self.ranks.leads and step < self.config.steps:
            self._say(
                f"stopped after step {step}/{self.config.steps}: the student's perplexity was at "
                f"most {self.config.stop_ratio:g} times the teacher's in every domain"
            )

    def export(self, step: int) -> None:
        """Publish the student after its last step as a plain folder; rank 0 works, errors reach
        all.

        Raises FrozenWeightsError where training changed more than adapters.
        """
        refuse_changed(self.student, self.frozen, self.ranks)
        error = None
        if self.ranks.leads and exported_step(self.files.export) != step:
            checkpoint = latest_checkpoint(self.files.checkpoints)
            assert checkpoint is not None, "the last step was saved"
            try:
                export_checkpoint(checkpoint, config=self.config, run_dir=self.files)
            except TutelageError as failure:
                error = failure
        self.ranks.agree(error)

    def _latest(self) -> Path | None:
        """Rank 0 looks for the checkpoint and the others follow, whatever they see themselves."""
        found, error = None, None
        if self.ranks.leads:
            try:
                found = latest_checkpoint(self.files.checkpoints)
            except TutelageError as failure:
                error = failure
        self.ranks.agree(error)
        return self.ranks.from_leader(found)

    def _evaluated(self) -> dict[str, DomainEvaluation]:
        spec = self.plan.evaluation_spec
        sums = self.validation.sums(self.engine, self.reader, spec)
        kind = "none" if self.reader is None or spec is None else self.plan.kl_kind
        return sums.evaluations(tuple(self.config.domains), kl_kind=kind)

    def _evaluations(self) -> dict[str, dict]:
        path = self.files.path / EVALUATIONS
        return json.loads(path.read_text()) if path.exists() else {}

    def _domain_report(self, step: int, sums: ValidationSums | None) -> DomainReport:
        learnt = self.since_report
        report = DomainReport(
            step=step,
            training_tokens=tuple(learnt.tokens_D.tolist()),
            training_kl_sums=tuple(learnt.by_domain("kl").tolist()),
            training_excess_sums=tuple(learnt.by_domain("excess").tolist()),
        )
        if sums is None:
            return report
        before = self._evaluations()["before"]
        return replace(
            report,
            student_nll_sums=tuple(sums.student_nll_G.tolist()),
            num_tokens=tuple(int(n) for n in sums.tokens_G),
            teacher_nlls=tuple(before[name]["teacher_nll"] for name in self.config.domains),
        )

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint can only be resumed with."""
        student, batch = self.config.student, self.config.batch
        facts = {
            "checkpoint format": CHECKPOINT_FORMAT,
            "student.workers": self.ranks.world_size,
            "student.zero": student.zero,
            "student.dtype": student.dtype,
            "student.train": student.train.model_dump(mode="json"),
            "seed": self.config.seed,
            "batch.rows_per_step": batch.rows_per_step,
            "batch.micro_batch": batch.micro_batch,
        }
        rows = {f"the text of {d.name}": [d.num_rows, d.num_loss_tokens] for d in self.plan.domains}
        base = {"the frozen weights": self.frozen.digest} if self.frozen else {}
        ordered = [domain for domain in self.supply.domains if domain.digest]
        return facts | base | rows | {f"the order of {d.name}": d.digest for d in ordered}

    def _say(self, text: str) -> None:
        log.info(text)
        with self.files.progress.open("a") as file:
            file.write(text + "\n")


def open_run(plan: RunPlan, open_reader: OpenReader | None, open_controller: OpenController) -> Run:
    """Join the other ranks, load the student and build everything a run needs.

    `open_reader` is None where nothing is asked of a teacher. Raises what `load_student` raises,
    on all ranks together.
    """
    device = this_device()
    join(device)
    ranks = Ranks()
    config = plan.config
    student, teacher_head = _load_together(plan, device, ranks)
    objective = Objective(
        student, config, teacher_width=plan.teacher_width, teacher_head=teacher_head
    ).to(device)
    layouts = Layouts(tuple(config.domains), plan.packed, device)
    reader = open_reader(ranks.rank) if open_reader is not None else None
    controller = open_controller() if ranks.leads else None
    engine = open_engine(objective, config)
    spec, student_ids = plan.target_spec, None
    if spec is not None and spec.student_ids:
        student_ids = StudentIds(engine, layouts, spec)
    train = tuple(RowStore.open(domain.train_path) for domain in plan.domains)
    validation = tuple(RowStore.open(domain.validation_path) for domain in plan.domains)
    for folder in (RunDir(Path(plan.run_dir)).logs, RunDir(Path(plan.run_dir)).checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(
        plan=plan,
        ranks=ranks,
        student=student,
        engine=engine,
        frozen=frozen_weights(student, engine.module, ranks),
        layouts=layouts,
        supply=Supply(
            plan,
            train,
            ranks=ranks,
            reader=reader,
            controller=controller,
            student_ids=student_ids,
        ),
        validation=Validation(validation, layouts, ranks, config.batch.micro_batch),
        interval=_empty_interval(config),
        since_report=SinceReport.empty(len(config.domains)),
        interpolation=Interpolation.start(config.taid),
        reader=reader,
        controller=controller,
    )


def close_run(run: Run) -> None:
    """Let go of the teacher and the engine."""
    if run.reader is not None:
        run.reader.close()
    run.engine.destroy()


def is_finished(plan: RunPlan) -> bool:
    """Whether nothing is left to do: evaluated, exported, and the last step is saved."""
    files = RunDir(Path(plan.run_dir))
    evaluations = files.path / EVALUATIONS
    return (
        plan.mode == "train"
        and exported_step(files.export) == _end(plan)
        and evaluations.exists()
        and "after" in json.loads(evaluations.read_text())
    )


def _end(plan: RunPlan) -> int:
    """Steps of a run, as its weight log has it."""
    log_path = RunDir(Path(plan.run_dir)).weight_log
    return read_log(log_path, plan.config.domains).end(plan.config.steps)


def _load_together(plan: RunPlan, device: Any, ranks: Ranks) -> tuple[Student, TeacherHead | None]:
    student, teacher_head, error = None, None, None
    try:
        student = load_student(plan.config, device=device)
        teacher_head = load_teacher_head(plan, device)
    except TutelageError as failure:
        error = failure
    ranks.agree(error)
    assert student is not None, "an error would have been raised"
    return student, teacher_head


def _empty_interval(config: Config) -> Interval:
    return Interval.empty(len(config.losses), len(config.domains))


def _line_before(step: int, config: Config) -> int:
    """Step of the metrics line before the one at `step`."""
    return (step - 1) // config.log_every * config.log_every

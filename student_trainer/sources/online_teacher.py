"""A teacher whose modules learn beside the student: which version answers a step, and what each
step teaches them (OKD, arXiv 2409.12512).

Version v is what v steps have taught. A step is answered by the version of `lag` steps before it,
whatever the timing, and teaches the newest one: its labels, and what the student says before it
learns the step itself.

R rows   M ids that the student names   X the same and all others together
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from shared.config.models.modules import TrainedModules, unserved
from shared.data.rows import Rows
from shared.errors import ConfigError, NonFiniteLossError, TutelageError
from shared.prompts.prefix import DocumentOpenings, shown
from shared.run.metrics import ModulesMetrics
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.lessons import Lesson, ModuleTrainer, OpenModules
from shared.targets.question import Question
from shared.targets.weights import BEGINNING, ModuleFiles, WeightsRef
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Layouts, Step
from student_trainer.state.checkpoint import all_checkpoints, step_of

MODULES = "modules"  # the name of its state in checkpoints


@dataclass(slots=True)
class OnlineTeacher:
    """Versions of a teacher's modules as a run follows them; satisfies `Stateful`. All ranks call
    every method together."""

    asked: TrainedModules
    lag: int
    ask: LikeliestIds  # how many ids of the student go with a lesson, and below which
    engine: Any  # a DeepSpeed engine around the Objective
    layouts: Layouts
    ranks: Ranks
    files: RunDir
    openings: Mapping[str, DocumentOpenings]  # what the teacher is shown, by domain
    trainer: ModuleTrainer | None  # on rank 0, in training
    _known: dict[int, WeightsRef] = field(default_factory=lambda: {0: BEGINNING})
    _taught: int = 0  # lessons given, those under way among them
    _sums_3: np.ndarray = field(default_factory=lambda: np.zeros(3))  # lessons, NLLs, divergences

    def question(self, question: Question, step: int) -> Question:
        """The question as it is asked about the rows of a step. Waits for the version. Raises
        TeacherError, or a UserError, on all ranks."""
        version = max(0, step - self.lag)
        self._learn(through=version)
        return replace(question, weights=self._known[version])

    def teach(self, step: Step) -> None:
        """Give the lesson of a step that is not learnt yet; nothing waits for what comes of it."""
        said, error = [], None
        try:
            said = self._said(step)
        except TutelageError as failure:
            error = failure
        self.ranks.agree(error)
        units = self._as_asked(said)
        gathered = [table for tables in self.ranks.gather(units) for table in tables]
        self._learn(through=step.index)
        error = None
        if self.ranks.leads:
            try:
                self._forget(step.index)
                lesson = Lesson(self._known[step.index], tuple(len(table) for table in gathered))
                self._trainer.submit(Rows(pa.concat_tables(gathered).combine_chunks()), lesson)
            except TutelageError as failure:
                error = failure
        self.ranks.agree(error)
        self._taught = step.index + 1

    def take_line(self) -> ModulesMetrics | None:
        """What the lessons since the last line measured; None without any. Waits for those under
        way."""
        self._learn(through=self._taught)
        (lessons, nll, kl), self._sums_3 = self._sums_3.tolist(), np.zeros(3)
        if not lessons:
            return None
        student_kl = kl / lessons if self.asked.eta else None
        return ModulesMetrics(version=self._taught, nll=nll / lessons, student_kl=student_kl)

    def state(self) -> dict[str, Any]:
        """See `Stateful`. Waits for the lessons under way."""
        self._learn(through=self._taught)
        kept = range(max(0, self._taught - self.lag), self._taught + 1)
        versions = [asdict(self._known[version]) for version in kept]
        return {"versions": versions, "sums": self._sums_3.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        refs = [WeightsRef(**fields) for fields in state["versions"]]
        self._known = {ref.version: ref for ref in refs}
        self._taught, self._sums_3 = refs[-1].version, np.array(state["sums"])

    def close(self) -> None:
        """Drop what is under way."""
        if self.trainer is not None:
            self.trainer.close()

    def _said(self, step: Step) -> list[Rows]:
        """The units with what the student says of them, one forward pass each, without dropout.
        Raises NonFiniteLossError where that is no number."""
        if not self.asked.eta:
            return list(step.units)
        training, said = self.engine.training, []
        self.engine.eval()
        for rows in step.units:
            with torch.no_grad():
                batch = self.layouts.batch(rows)
                ids_NM, logprob_NX = self.engine(batch, mode="spread", asked=self.ask)
            arrays = ids_NM.cpu().numpy(), logprob_NX.float().cpu().numpy()
            said.append(rows.with_student_logprobs(*arrays))
        self.engine.train(training)
        if bad := [rows for rows in said if not _is_finite(rows)]:
            raise NonFiniteLossError(
                f"the student's log-probabilities before step {step.index + 1}, which the "
                "teacher's modules would learn from, are not finite on rows "
                f"{', '.join(rows.named() for rows in bad)}; look at these rows, or lower "
                "optimiser.lr and start over with --fresh, which moves this run aside"
            )
        return said

    def _as_asked(self, units: list[Rows]) -> list[pa.Table]:
        """The units as the teacher sees them, copied so that they travel without others."""
        sent = [shown(rows, self.openings) if self.openings else rows for rows in units]
        return [rows.table.take(pa.array(range(len(rows)), pa.int64())) for rows in sent]

    def _learn(self, *, through: int) -> None:
        """Wait for the outcome of lessons until a version is known, or all are that were given."""
        while max(self._known) < min(through, self._taught):
            learnt, error = None, None
            if self.ranks.leads:
                try:
                    learnt = self._trainer.next()
                except TutelageError as failure:
                    error = failure
            self.ranks.agree(error)
            ref, losses = self.ranks.from_leader(learnt and (learnt.modules, learnt.losses))
            self._known[ref.version] = ref
            self._sums_3 += [1, *losses]

    def _forget(self, step: int) -> None:
        """Drop versions that neither the steps to come nor a checkpoint names."""
        resumed = {*map(step_of, all_checkpoints(self.files.checkpoints)), step}
        spans = [range(done - self.lag, done + 1) for done in resumed]
        self._known = {v: ref for v, ref in self._known.items() if v >= step - self.lag}
        ModuleFiles(self.files.modules).forget(
            lambda version: version > step or any(version in span for span in spans)
        )

    @property
    def _trainer(self) -> ModuleTrainer:
        assert self.trainer is not None, "rank 0 has a way to the teacher in training"
        return self.trainer


def _is_finite(rows: Rows) -> bool:
    """Whether what the student says of rows are numbers; -inf is that of no other ids."""
    logprob_NX = rows.student_logprobs()
    return logprob_NX is None or not np.isnan(logprob_NX).any()


def open_online_teacher(
    plan: RunPlan,
    engine: Any,
    layouts: Layouts,
    ranks: Ranks,
    *,
    open_modules: OpenModules | None,
) -> OnlineTeacher | None:
    """What follows the modules of a plan's teacher; None where it has none. Raises ConfigError
    where nothing here can train them."""
    config, question = plan.config, plan.training_question
    asked = config.modules
    if asked is None or question is None:
        return None
    trains = plan.mode == "train"
    if trains and open_modules is None:
        raise ConfigError(unserved(config.teachers))
    vocabulary = question.ask.shared_vocab
    return OnlineTeacher(
        asked,
        config.modules_lag,
        LikeliestIds(min(asked.top_k, vocabulary), vocabulary),
        engine,
        layouts,
        ranks,
        RunDir(Path(plan.run_dir)),
        plan.openings,
        open_modules() if open_modules is not None and trains and ranks.leads else None,
    )

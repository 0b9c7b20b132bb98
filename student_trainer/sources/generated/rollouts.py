"""Rollouts as a source of tokens: rows of the data set, some answered by the student itself or by
its teacher.

Which rows they answer is a pure function of seed and step, and what the student writes one of the
row, its draw and the version of the weights, which is the number of updates behind them: step s
learns what version s - lag wrote (the first steps what version 0 did). So every rank draws every
step exactly `lag` steps ahead, and keeps on disk what it drew before anything is learnt from it.
What the teacher writes depends on no version: where it writes alone, steps are drawn as those of
the data set are.

R rows of a rank for a step   D domains in config order
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.config.source import TokenSources
from shared.data.rollouts import (
    DATA_SET,
    STUDENT,
    TEACHER,
    Rollout,
    RowPrompt,
    prompts_of,
    with_others,
    with_rollouts,
    writers,
)
from shared.data.rows import Rows
from shared.errors import ConfigError, TutelageError
from shared.mixture.blocks import Block
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir, append_progress
from shared.targets.generation import OpenTeachers, RemoteGenerator
from student_trainer.models.writing import Writer
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.generated.adaptive import Adaptive, Dealt, oldest_step
from student_trainer.sources.generated.continuing import continued, spec_of
from student_trainer.sources.generated.partners import Partners
from student_trainer.sources.generated.rollout_files import RolloutFiles
from student_trainer.sources.generated.teacher_texts import TeacherPrompt, TeacherTexts, TextFiles
from student_trainer.sources.source import EFFORT, Drawn, FinishDrawn, TokenSource
from student_trainer.state.checkpoint import all_checkpoints, read_state, step_of
from student_trainer.waiting import waiting

# Options that checkpoints name only where they are not at their defaults.
LATER_OPTIONS = ("teacher", "draws", "adaptive", "updates", "teacher_mix")
ADAPTIVE = "adaptive"  # of checkpoints: the state of `Adaptive`


def open_rollouts(
    source: TokenSource,
    plan: RunPlan,
    ranks: Ranks,
    *,
    writer: Writer | None,
    open_teachers: OpenTeachers | None,
) -> "Rollouts":
    """The data set with answers of student and teacher; `writer` is who writes as the student where
    it does. Raises ConfigError where no teacher can write."""
    assert isinstance(source, DataSet), "models write from rows of the data set"
    texts, partners, asked = None, None, plan.config.source
    teachers: Mapping[str, RemoteGenerator] = {}
    if asked.teachers_write:
        if open_teachers is None:
            raise ConfigError(asked.unwritten)
        teachers = open_teachers(ranks.rank)
    if asked.teacher:
        files = TextFiles(RunDir(Path(plan.run_dir)).teacher_texts)
        texts = TeacherTexts(plan, ranks.rank, files, teachers)
    if asked.teacher_mix:
        partners = Partners(plan, teachers)
    adaptive = None
    if plan.config.source.adaptive is not None:
        adaptive = Adaptive(plan.config.source.adaptive, plan.config.seed, plan.config.steps)
    return Rollouts(source, plan, ranks, writer, teachers, texts, partners, adaptive)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A block that all ranks have begun."""

    step: int
    written_at: int  # the first step that learns it
    version: int  # of the weights that write it
    dealt: Dealt | None  # None: it was written before, and is read
    rows: Rows  # of this rank
    place_R: np.ndarray  # where in the block they stand
    epoch_R: np.ndarray


@dataclass(slots=True)
class Rollouts:
    """Blocks of the data set in which student and teacher answer their shares of the rows; a
    `TokenSource`."""

    data_set: DataSet
    plan: RunPlan
    ranks: Ranks
    writer: Writer | None  # where the student writes
    teachers: Mapping[str, RemoteGenerator] = field(default_factory=dict)  # asked to write, by name
    texts: TeacherTexts | None = None  # where the teacher writes
    partners: Partners | None = None  # where it has a share in what the student writes
    adaptive: Adaptive | None = None  # where the student's share moves
    # What this rank did since it was last taken, as `EFFORT` has it, by whatever thread.
    effort: deque[np.ndarray] = field(default_factory=deque)
    _began: int | None = field(default=None)  # the step that this process drew first
    # The oldest checkpoint, and the first step whose rows a run that goes on from it needs.
    _needed: tuple[int, int] | None = field(default=None)

    @property
    def ahead(self) -> int:
        """See `TokenSource`."""
        return self.plan.config.rollout_lag if self.fixed else self.data_set.ahead

    @property
    def fixed(self) -> bool:
        """See `TokenSource`."""
        return self.plan.config.source.writes

    @property
    def in_turn(self) -> bool:
        """Whether a block is begun when all ranks have finished those before it, which it reads
        of."""
        return self.texts is not None or self.adaptive is not None

    def draw(self, step: int) -> Drawn | FinishDrawn:
        """Block `step` with its shares written: by the student with the weights of this moment, or
        read again where those that wrote it lie behind the checkpoint that this run went on
        from."""
        finish = partial(self._finished, self._begun(step))
        if self.writer is None or self.writer.apart:
            return finish
        found, error = None, None
        with self.waiting(step):
            try:
                found = finish()
            except TutelageError as failure:
                error = failure
            self.ranks.agree(error)
        assert found is not None, "an error would have been raised"
        return found

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Count, and say where it is long, that a `with` waits for the texts of a step, on all
        ranks."""
        start = time.perf_counter()
        what = (
            f"rank {self.ranks.rank} waits until all ranks have what is written for step "
            f"{step + 1}, at most {self.ranks.patience_s:g} s for another one, and has waited"
        )
        with ExitStack() as stack:
            stack.enter_context(waiting(what, partial(append_progress, self._folder)))
            for teacher in self.teachers.values():
                stack.enter_context(teacher.waiting())
            if self.writer is not None:
                stack.enter_context(self.writer.waiting())
            yield
        self._spent(writing_wait_s=time.perf_counter() - start)

    def _begun(self, step: int) -> _Begun:
        """What all ranks decide together about a block, and the weights that write it."""
        files = RolloutFiles(self._folder.rollouts)
        if self._began is None:
            self._began = step
            if self.ranks.leads:
                files.forget(since=step + self.ahead if step else 0)
            self.ranks.wait()
        elif self.ranks.leads:
            files.forget(before=self._oldest_resumed())
        block, whole = self.data_set.block(step // self._updates)
        slices = self.data_set.shard.units(len(whole))
        place_R = np.concatenate([np.arange(len(whole))[unit] for unit in slices])
        first = step - step % self._updates  # of those that learn this block
        version = max(0, first - self.ahead)
        is_kept = self.fixed and (first < step or version < self._began)
        if self.writer is not None and not is_kept:
            self.writer.prepare(version)
            self._spent(pushed_bytes=self.writer.take_bytes())
        return _Begun(
            step=step,
            written_at=first,
            version=version,
            dealt=None if is_kept else self._dealt(step, block),
            rows=Rows(whole.table.take(pa.array(place_R))),
            place_R=place_R,
            epoch_R=block.epoch_R[place_R],
        )

    def _finished(self, begun: _Begun) -> Drawn:
        """A rank's rows of a step; what the student wrote lies on disk when this returns."""
        step, version, place_R = begun.step, begun.version, begun.place_R
        files = RolloutFiles(self._folder.rollouts)
        if begun.dealt is None:
            # others stand in for some
            names = begun.rows.names() if self.adaptive is None else None
            found = files.read(begun.written_at, names, place_R=place_R, version=version)
        else:
            found = self._written(begun, begun.dealt)
            if self.fixed:
                files.keep(step, self.ranks.rank, found, place_R=place_R, version=version)
        size = self.plan.config.batch.micro_batch
        units = tuple(found.part(slice(at, at + size)) for at in range(0, len(found), size))
        return Drawn(step, units, None)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """See `TokenSource`."""
        return self.data_set.epochs(-(-steps // self._updates))

    def facts(self) -> dict[str, Any]:
        """Those of the data set, and how models write."""
        source = self.plan.config.source.model_dump(mode="json", exclude={"batch_rows"})
        defaults = TokenSources().model_dump(mode="json")
        later = {name for name in LATER_OPTIONS if source[name] == defaults[name]}
        named = {name: value for name, value in source.items() if name not in later}
        return self.data_set.facts() | {"source": named | {"lag": self.ahead}}

    def take_effort(self) -> np.ndarray:
        """What this rank did since the last call, as `EFFORT` has it."""
        found = np.zeros(len(EFFORT))
        while self.effort:
            found += self.effort.popleft()
        return found

    def close(self) -> None:
        """Let go of those who write."""
        for teacher in self.teachers.values():
            teacher.close()
        if self.writer is not None:
            self.writer.close()

    @property
    def _updates(self) -> int:
        return self.plan.config.source.updates

    @property
    def _shared_vocab(self) -> int:
        """Ids that every teacher can be asked about."""
        question = self.plan.training_question
        assert question is not None, "a loss asks a teacher"
        return question.ask.shared_vocab

    @property
    def _folder(self) -> RunDir:
        return RunDir(Path(self.plan.run_dir))

    def _oldest_resumed(self) -> int:
        """The first step whose rows are needed by a run that goes on from any checkpoint."""
        checkpoints = sorted(all_checkpoints(self._folder.checkpoints), key=step_of)
        if not checkpoints:
            return 0
        first = step_of(checkpoints[0])
        first -= first % self._updates
        if self.adaptive is None:
            return first
        if self._needed is None or self._needed[0] != first:
            try:
                oldest = oldest_step(read_state(checkpoints[0])[ADAPTIVE])
            except (OSError, ValueError, KeyError):  # it is damaged: nobody knows what it needs
                return 0
            self._needed = (first, int(min(first, oldest)))
        return self._needed[1]

    def _dealt(self, step: int, block: Block) -> Dealt:
        """Who answers the rows of a block, all ranks' rows."""
        if self.adaptive is None:
            return Dealt(self._writers(step, block), {})
        domain_R = np.asarray(block.domain_index_R)
        return self.adaptive.deal(step, domain_R, of_rows=self.data_set.share_of_rows)

    def _writers(self, step: int, block: Block) -> np.ndarray:
        """Who answers the rows of a block by fixed shares, as `writers` says."""
        source = self.plan.config.source
        before_D = self.data_set.rows_drawn(step // self._updates)
        domain_R = block.domain_index_R
        who_R = np.full(len(domain_R), DATA_SET)
        for index in np.unique(domain_R):
            own = np.flatnonzero(domain_R == index)
            share = self.data_set.share_of_rows(int(index), source.first_share)
            student = share * (source.student / (source.student + source.teacher))
            counted = range(before_D[index], before_D[index] + len(own))
            who_R[own] = writers(student, share - student, counted)
        return who_R

    def _written(self, begun: _Begun, dealt: Dealt) -> Rows:
        """A rank's rows with what student and teacher write now."""
        rows, place_R = begun.rows, begun.place_R
        who_R = dealt.who_R[place_R]
        config = self.plan.config
        prompts = list(prompts_of(rows, config.source, context=config.data.context))
        own, taught = (
            [prompt for prompt in prompts if who_R[prompt.row] == writer]
            for writer in (STUDENT, TEACHER)
        )
        rollouts = self._by_student(begun, own) + self._by_teacher(begun, taught)
        version_R = np.where(who_R == STUDENT, begun.version, who_R)
        mixed = self.partners is not None
        found = with_rollouts(rows, rollouts, version_R=version_R, mixed=mixed)
        files, again = RolloutFiles(self._folder.rollouts), {}
        for line, at in enumerate(place_R.tolist()):
            if at in dealt.replayed:
                written, place = dealt.replayed[at]
                again[line] = files.read(written, None, place_R=np.array([place]))
        return with_others(found, again)

    def _by_student(self, begun: _Begun, prompts: Sequence[RowPrompt]) -> list[Rollout]:
        """What the student writes after prompts."""
        if self.writer is None:
            return []
        start, names = time.perf_counter(), begun.rows.names()
        drawn_R = [
            f"{row}/{epoch}/{begun.step}" for row, epoch in zip(names, begun.epoch_R, strict=True)
        ]
        with self.writer.at(begun.version) as generator:
            rollouts = continued(
                generator,
                prompts,
                begun.rows,
                drawn_R,
                plan=self.plan,
                vocab=self._shared_vocab,
                partners=self.partners,
            )
        tokens = sum(len(rollout.output_ids) for rollout in rollouts)
        self._spent(
            writing_s=time.perf_counter() - start,
            tokens_written=tokens,
        )
        return rollouts

    def _by_teacher(self, begun: _Begun, prompts: Sequence[RowPrompt]) -> list[Rollout]:
        """What teachers write after prompts, or wrote before: each draw of a row once."""
        if self.texts is None:
            return []
        start, draws = time.perf_counter(), self.plan.config.source.draws
        names, domains, epoch_R = begun.rows.names(), begun.rows.domains(), begun.epoch_R
        config, ends = self.plan.config, self.plan.ends
        asked = [
            TeacherPrompt(
                prompt,
                name=names[prompt.row],
                domain=domains[prompt.row],
                draw=f"{names[prompt.row]}/{epoch_R[prompt.row] % draws}/{prompt.document}",
                spec=spec_of(
                    config, prompt.room, ends=ends, vocab=self._vocab_of(domains[prompt.row])
                ),
            )
            for prompt in prompts
        ]
        rollouts = self.texts.written(begun.step, asked)
        self._spent(
            teacher_writing_s=time.perf_counter() - start,
            teacher_tokens_written=self.texts.take_tokens(),
        )
        return rollouts

    def _spent(self, **effort: float) -> None:
        """Count what this rank did, by the names of `EFFORT`."""
        self.effort.append(np.array([effort.get(name, 0.0) for name in EFFORT]))

    def _vocab_of(self, domain: str) -> int:
        """Ids that both the student and a domain's teacher know."""
        part = self.plan.by_teacher[self.plan.config.teacher_of(domain)]
        question = part.training_question or part.validation_question
        assert question is not None, "a live teacher is asked on validation text"
        return question.ask.shared_vocab

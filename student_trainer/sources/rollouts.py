"""Rollouts as a source of tokens: rows of the data set, some answered by the student itself.

Which rows it answers is a pure function of seed and step, and what it writes one of the row, its
draw and the version of the weights, which is the number of updates behind them: step s learns what
version s - lag wrote (the first steps what version 0 did). So every rank draws every step exactly
`lag` steps ahead, and keeps on disk what it drew before anything is learnt from it.

R rows of a rank for a step   D domains in config order
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.data.rollouts import (
    DATA_SET,
    Rollout,
    RowPrompt,
    dealt,
    prompts_of,
    with_rollouts,
)
from shared.data.rows import Rows
from shared.errors import ConfigError, TutelageError
from shared.mixture.blocks import Block
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.targets.generation import GenerationSpec, Generator, OpenGenerator, Openings
from student_trainer.accelerator import this_device
from student_trainer.models.writing import Writing
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.rollout_files import RolloutFiles
from student_trainer.sources.source import Drawn, TokenSource
from student_trainer.state.checkpoint import all_checkpoints, step_of


def open_rollouts(
    source: TokenSource,
    plan: RunPlan,
    ranks: Ranks,
    writing: Writing,
    open_generator: OpenGenerator | None,
) -> "Rollouts":
    """The data set with the student's own answers. Raises ConfigError where nothing can write."""
    assert isinstance(source, DataSet), "the student writes from rows of the data set"
    config = plan.config
    if open_generator is None:
        raise ConfigError(
            f"source has student {config.source.student:g}, but nothing here can write; use "
            "`tutelage run`, or source=dataset"
        )
    generator = open_generator(
        writing.model,
        device=this_device(),
        dtype=config.student.dtype,
        batch_rows=config.source.batch_rows,
    )
    return Rollouts(source, plan, ranks, generator, writing)


@dataclass(slots=True)
class Rollouts:
    """Blocks of the data set in which the student answers its share of the rows; a
    `TokenSource`."""

    data_set: DataSet
    plan: RunPlan
    ranks: Ranks
    generator: Generator
    writing: Writing
    # Seconds that this rank spent writing since they were last taken, and the tokens it wrote then.
    effort: np.ndarray = field(default_factory=lambda: np.zeros(2))
    _began: int | None = field(default=None)  # the step that this process drew first

    @property
    def ahead(self) -> int:
        """See `TokenSource`."""
        return self.plan.config.rollout_lag

    @property
    def fixed(self) -> bool:
        """See `TokenSource`."""
        return True

    def draw(self, step: int) -> Drawn:
        """Block `step`, its share written with the weights of this moment, or read again where
        those that wrote it lie behind the checkpoint that this run went on from."""
        files, version = RolloutFiles(self._folder.rollouts), max(0, step - self.ahead)
        if self._began is None:
            self._began = step
            if self.ranks.leads:
                files.forget(since=step + self.ahead if step else 0)
            self.ranks.wait()
        block, whole = self.data_set.block(step)
        slices = self.data_set.shard.units(len(whole))
        place_R = np.concatenate([np.arange(len(whole))[unit] for unit in slices])
        own = Rows(whole.table.take(pa.array(place_R)))
        found, error = None, None
        try:
            if version < self._began:
                found = files.read(step, own.names(), place_R=place_R, version=version)
            else:
                found = self._written(step, block, own, place_R=place_R, version=version)
                files.keep(step, self.ranks.rank, found, place_R=place_R, version=version)
        except TutelageError as failure:
            error = failure
        self.ranks.agree(error)
        assert found is not None, "an error would have been raised"
        if self.ranks.leads:
            files.forget(before=self._oldest_resumed())
        size = self.plan.config.batch.micro_batch
        units = tuple(found.part(slice(at, at + size)) for at in range(0, len(found), size))
        return Drawn(step, units, None)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """See `TokenSource`."""
        return self.data_set.epochs(steps)

    def facts(self) -> dict[str, Any]:
        """Those of the data set, and how the student writes."""
        source = self.plan.config.source.model_dump(mode="json", exclude={"batch_rows"})
        return self.data_set.facts() | {"source": source | {"lag": self.ahead}}

    def take_effort(self) -> np.ndarray:
        """Seconds spent writing since the last call, and tokens written in them."""
        found, self.effort = self.effort, np.zeros(2)
        return found

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
        """The first step that any checkpoint may be gone on from."""
        return min(map(step_of, all_checkpoints(self._folder.checkpoints)), default=0)

    def _is_written(self, step: int, block: Block) -> np.ndarray:
        """Which rows of a block the student answers, bool, all ranks' rows."""
        domain_R, before_D = block.domain_index_R, self.data_set.rows_drawn(step)
        is_written_R = np.zeros(len(domain_R), bool)
        for index, share in enumerate(self.data_set.written_shares):
            own = np.flatnonzero(domain_R == index)
            is_written_R[own] = dealt(share, range(before_D[index], before_D[index] + len(own)))
        return is_written_R

    def _written(
        self, step: int, block: Block, rows: Rows, *, place_R: np.ndarray, version: int
    ) -> Rows:
        """A rank's rows with what the student writes now."""
        start = time.perf_counter()
        is_written_R = self._is_written(step, block)[place_R]
        config = self.plan.config
        prompts = [
            prompt
            for prompt in prompts_of(rows, config.source, context=config.data.context)
            if is_written_R[prompt.row]
        ]
        epoch_R = block.epoch_R[place_R]
        drawn_R = [
            f"{row}/{epoch}/{step}" for row, epoch in zip(rows.names(), epoch_R, strict=True)
        ]
        with self.writing.ready():
            rollouts = self._rollouts(prompts, rows.names(), drawn_R)
        tokens = sum(len(rollout.output_ids) for rollout in rollouts)
        self.effort += (time.perf_counter() - start, tokens)
        version_R = np.where(is_written_R, version, DATA_SET)
        return with_rollouts(rows, rollouts, version_R=version_R)

    def _rollouts(
        self, prompts: Sequence[RowPrompt], name_R: Sequence[str], drawn_R: Sequence[str]
    ) -> list[Rollout]:
        """What the student writes after prompts, in their order; those of one room together."""
        found: dict[int, Rollout] = {}
        for room in sorted({prompt.room for prompt in prompts}):
            lines = [line for line, prompt in enumerate(prompts) if prompt.room == room]
            asked = [prompts[line] for line in lines]
            openings = Openings.build(
                names=[name_R[prompt.row] for prompt in asked],
                input_ids=[prompt.input_ids for prompt in asked],
            ).with_draws([f"{drawn_R[prompt.row]}/{prompt.document}" for prompt in asked])
            answer = self.generator.generate(openings, self._spec(room))
            parts = zip(answer.written(), answer.logprobs(), answer.stopped(), strict=True)
            found |= {
                line: Rollout(prompt, *part)
                for line, prompt, part in zip(lines, asked, parts, strict=True)
            }
        return [found[line] for line in range(len(prompts))]

    def _spec(self, room: int) -> GenerationSpec:
        source = self.plan.config.source
        return GenerationSpec(
            room,
            stop_ids=self.plan.ends,
            temperature=source.temperature,
            seed=self.plan.config.seed,
            top_p=source.top_p,
            min_new_tokens=min(source.min_new_tokens, room),
            vocab=self._shared_vocab,
            logprobs=True,
        )

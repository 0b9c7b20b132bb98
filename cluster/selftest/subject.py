"""What `selftest` looks at: rows, the teacher's answers to them, and how a student sees both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shared.config.run import Config
from shared.data.row_store import RowStore, take_rows
from shared.data.rows import Rows
from shared.loading import in_few_bits
from shared.run.plan import OpenReader, RunPlan
from shared.targets.question import Question
from shared.targets.reader import TargetReader, answered
from shared.targets.soft_targets import SoftTargets
from student_trainer.accelerator import this_device
from student_trainer.objective import Objective
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.weighing.weighed import weighed_batches, weighers_of

UNITS_AHEAD = 3
# Largest error that is rounding: KL in nats per token, log-probability in nats, relative loss, and
# what a loss that should vanish is of what it is one position off: fp16 has a probability right to
# 2^-8 down to e^-16 (up to 0.002 was seen, in bfloat16 0.09), int8 to half of 1/255 of the range.
FINE = {"kl": 1e-4, "logprob": 1e-3, "loss": 1e-3, "share": 1e-2}
# Where a model is not in float32.
COARSE = {"kl": 5e-2, "logprob": 0.5, "loss": 5e-2, "share": 0.25}
INT8 = {"kl": 1e-2, "share": 5e-2}


@dataclass(frozen=True, slots=True)
class Subject:
    """Rows, the teacher's answers to them and how a student sees both."""

    plan: RunPlan
    question: Question
    rows: Rows
    whole: SoftTargets  # the rows as one unit
    ranked: SoftTargets  # the same, with the likeliest ids: what is drawn is right on average alone
    single: tuple[SoftTargets, ...]  # each row as a unit of its own
    reader: TargetReader
    device: torch.device

    @property
    def config(self) -> Config:
        """The run's."""
        return self.plan.config

    @property
    def tokens(self) -> int:
        """Loss tokens of the rows."""
        return int(self.rows.num_loss_tokens().sum())

    @property
    def layouts(self) -> Layouts:
        """How rows become tensors."""
        domains, plan = tuple(self.config.domains), self.plan
        return Layouts(domains, plan.packed, self.device, CAUSAL_LM, passes=plan.passes)

    def batches(
        self, cut: Sequence[tuple[Rows, SoftTargets]], objective: Objective
    ) -> Iterator[Batch]:
        """The tensors of a step cut into units, with the weights of its positions where a loss has
        some."""
        return weighed_batches(
            cut,
            self.layouts,
            weighers_of(self.config.losses),
            engine=objective,
            gather=lambda own_N: [own_N],
        )

    @property
    def in_few_bits(self) -> bool:
        """Whether the teacher's weights are quantised."""
        return in_few_bits(self.plan.teacher or {})

    @property
    def tolerance(self) -> dict[str, float]:
        """What is rounding in the types of this pair."""
        teacher = next(iter(self.config.teachers.values()))
        fine = teacher.dtype == self.config.student.dtype == "float32"
        found = COARSE if self.in_few_bits or not fine else FINE
        coarser = INT8 if self.question.ask.is_rounded else {}
        return found | {name: max(found[name], value) for name, value in coarser.items()}


def subject_of(plan: RunPlan, open_reader: OpenReader) -> Subject:
    """The first validation rows of all domains in turn, a micro-batch and at least two, scored."""
    assert plan.training_question is not None, "selftest asks a teacher"
    stores = [RowStore.open(domain.validation_path) for domain in plan.domains]
    count, num = max(2, plan.config.batch.micro_batch), len(stores)
    places = [(i % num, i // num % len(stores[i % num])) for i in range(count)]
    rows = take_rows(stores, *(np.array(column) for column in zip(*places, strict=True)))
    # No student is there to name ids: as many of the likeliest stand for them.
    reader, asked = open_reader(0), plan.training_question
    question = replace(asked, ask=asked.ask.without_student())
    units = [rows, *(rows.part(slice(i, i + 1)) for i in range(count))]
    whole, *single = answers(reader, units, question)
    ranked = whole
    if question.ask.is_estimate:
        (ranked,) = answers(reader, [rows], Question(question.ask.exact(), prefix=question.prefix))
    return Subject(plan, question, rows, whole, ranked, tuple(single), reader, this_device())


def answers(
    reader: TargetReader, units: Sequence[Rows], question: Question
) -> Iterator[SoftTargets]:
    """The units' answers in order, a few asked for ahead."""
    return (answer for _, answer in answered(reader, units, question, ahead=UNITS_AHEAD))

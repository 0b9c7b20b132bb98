"""The causal language model as a task: every position predicts the next token of its document."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.across.token_pair import TokenPair
from shared.config.run import Config
from shared.data.layout import Layout, lay_out
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.data.trust import Trust
from shared.run.plan import RunPlan
from shared.text.tokenizers import refuse_unless_same, shared_vocab
from student_trainer.tasks.task import Evaluation, ModelKind, Pairing, Side
from student_trainer.tasks.token_pairing import TokenPairing

if TYPE_CHECKING:
    import torch

    from student_trainer.models.student import Student
    from student_trainer.run import Run


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Learns the teacher's distribution of the next token; a `Task`."""

    @property
    def model(self) -> ModelKind:
        """See `Task`."""
        return ModelKind("AutoModelForCausalLM", "CAUSAL_LM")

    def agree(self, teacher: Side, student: Side, *, chat_rows: bool) -> int:
        """Both must name the same tokens by the same ids; padding rows of an embedding are no
        difference."""
        refuse_unless_same(
            teacher.tokens,
            student.tokens,
            teacher_name=teacher.name,
            student_name=student.name,
            chat_rows=chat_rows,
        )
        return shared_vocab(student.tokens, teacher_rows=teacher.rows, student_rows=student.rows)

    def trust(self, config: Config) -> Trust:
        """Probed on the student's own model."""
        from student_trainer.models.student import student_trust  # slow, as torch is

        return student_trust(config, self.model)

    def load(
        self, config: Config, *, device: "torch.device", export: Path | None = None
    ) -> "Student":
        """A decoder and the linear output head over it."""
        from student_trainer.models.student import load_student  # slow, as torch is

        return load_student(config, self.model, device=device, export=export)

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        """A label is the next token; the teacher's rows are laid out alike."""
        return lay_out(rows, packed=packed, passes=passes)

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def pairing(self, plan: RunPlan) -> Pairing | None:
        """By the bytes of their tokens, where the plan has another tokenizer's teacher."""
        if plan.token_pair is None:
            return None
        return TokenPairing(TokenPair.read(Path(plan.token_pair)))

    def evaluate(self, run: "Run") -> Evaluation:
        """Nats per token of student and teacher, and KL(teacher || student)."""
        from student_trainer.evaluation.documents import DocumentAccumulator  # slow, as torch is

        spec, documents = run.plan.validation_question, DocumentAccumulator()
        sums = run.validation.sums(run.engine, run.reader, spec, documents=documents)
        compared = run.reader is not None and spec is not None
        kinds = {n: run.plan.kl_kind_of(n) if compared else "none" for n in run.config.domains}
        joined = documents.joined(run.ranks, tuple(run.config.domains))
        return Evaluation(sums.evaluations(kinds), joined)


CAUSAL_LM = CausalLM()

"""Tasks that only tests have."""

from dataclasses import replace

import numpy as np

from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.run.metrics import DomainEvaluation
from shared.run.plan import RunPlan
from shared.targets.paired import PairedTargets
from student_trainer.answers import answer_arrays
from student_trainer.run import Run
from student_trainer.tasks.causal_lm import CausalLM
from student_trainer.tasks.task import Evaluation, ModelKind


class Echo(CausalLM):
    """Says the token again that it has just read; measured by the number of its rows alone."""

    @property
    def model(self) -> ModelKind:
        return replace(super().model, peft_task="FEATURE_EXTRACTION")

    def lay_out(self, rows: Rows, *, packed: bool, passes: Passes = TOGETHER) -> Layout:
        layout = super().lay_out(rows, packed=packed, passes=passes)
        return replace(layout, label_N=layout.input_ids_BT.ravel()[layout.loss_index_N])

    def evaluate(self, run: Run) -> Evaluation:
        stores = zip(run.config.domains, run.validation.stores, strict=True)
        return Evaluation(
            {
                name: DomainEvaluation(float(len(store)), None, None, "none", len(store))
                for name, store in stores
            }
        )


class Aside(CausalLM):
    """Has the teacher read rows of its own, which hold the same tokens as the student's."""

    def pairing(self, plan: RunPlan) -> "Aside":
        return self

    def arrays(self, rows: Rows, layout: Layout, answer: PairedTargets) -> dict[str, np.ndarray]:
        assert answer.rows.names() == rows.names()
        return answer_arrays(answer.targets)

"""From steps to units to tensors: what a rank trains on.

A unit is the rows of one (step, rank, micro-batch). It is fixed before anything is sent, so that
teacher and student see the same rows in the same order whatever is retried or restarted.

R rows of a unit   D domains in config order   B lines   T tokens   N positions with loss
"""

from dataclasses import dataclass

import numpy as np
import torch

from shared.data.layout import Layout
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from shared.targets.paired import PairedTargets
from shared.targets.routing import Answer, MixedTargets, called, label_logprobs
from student_trainer.answers import answer_arrays, averaged_states
from student_trainer.tasks.task import Pairing, Task

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step as a rank sees it."""

    index: int
    units: tuple[Rows, ...]  # of this rank
    domain_tokens_D: np.ndarray  # loss tokens of the whole step, all ranks
    domain_rows_D: np.ndarray
    phase: int = 0  # of progressive distillation

    @property
    def tokens(self) -> int:
        """Loss tokens of the whole step: what every loss of the step is divided by."""
        return int(self.domain_tokens_D.sum())


@dataclass(frozen=True, slots=True)
class Layouts:
    """How rows become batches in this run."""

    domains: tuple[str, ...]
    packed: bool
    device: torch.device
    task: Task
    passes: Passes = TOGETHER
    pairing: Pairing | None = None  # None: the teacher reads the student's rows

    def lay_out(self, rows: Rows) -> Layout:
        """The padded batch of a unit, on the host."""
        return self.task.lay_out(rows, packed=self.packed, passes=self.passes)

    def batch(self, rows: Rows, targets: Answer | None = None) -> Batch:
        """The tensors of a unit on the device; with `targets`, the teacher's beside them, those of
        several under `TEACHER/NAME` with the positions of each, `TEACHER/index_P`. Where several
        are averaged they have one name together, see `shared.targets.routing.called`, and the
        states of each are called as `averaged_states` says.

        `domain_N`, `row_N` and `document_N` say which domain, row of the unit and document of the
        unit a position belongs to. Where the student writes rows, `written_N` says of which its
        label is, and `behaviour_N` with what log-probability it was drawn; where documents are
        changed, `changed_N` has the number of each, 0 of others. What the task's student reads
        beside tokens has the names that `Task.inputs` gives it.
        """
        layout = self.lay_out(rows)
        domain_R = np.array([self.domains.index(name) for name in rows.domains()], np.int64)
        arrays = {
            "input_ids_BT": layout.input_ids_BT,
            "position_ids_BT": layout.position_ids_BT,
            "length_B": layout.length_B,
            "loss_index_N": layout.loss_index_N,
            "label_N": layout.label_N,
            "row_N": layout.row_N,
            "document_N": layout.document_N,
            "domain_N": domain_R[layout.row_N],
        }
        if (version_R := rows.versions()) is not None:
            written_N = version_R[layout.row_N] >= 0
            arrays |= {"written_N": written_N, "behaviour_N": rows.behaviour()}
        if (changed := rows.changed()) is not None:
            arrays["changed_N"] = changed[layout.document_N]
        if len(layout.width_P) > 1:
            arrays |= {"pass_B": layout.pass_B, "width_P": layout.width_P}
        if isinstance(targets, MixedTargets):
            arrays |= _arrays_in_parts(targets)
        elif isinstance(targets, PairedTargets):
            assert self.pairing is not None, "the task pairs what it has the teacher read"
            arrays |= self.pairing.arrays(rows, layout, targets)
        elif targets is not None:
            arrays |= answer_arrays(targets)
        arrays |= self.task.inputs(rows)
        return {name: self._tensor(array) for name, array in arrays.items()}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        # Copied: what the object store maps is read-only.
        return torch.tensor(array).to(self.device, non_blocking=True)


def _arrays_in_parts(targets: MixedTargets) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part in targets.parts:
        own = answer_arrays(part.targets)
        if part.is_averaged:
            number = list(part.shares).index(part.teacher)
            own = {averaged_states(number): own["teacher_last_NE"]}
        named = {"index_P": part.index_P, **own}
        arrays |= {f"{called(part.shares)}/{name}": array for name, array in named.items()}
    return {**arrays, "label_logprob_N": label_logprobs(targets)}

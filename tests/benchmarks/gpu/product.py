"""The product's loss, called by the sections.

N positions   D width   V vocabulary
"""

from types import SimpleNamespace

from torch import Tensor

from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses
from tests.benchmarks.losses import Problem


def loss_of(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    *,
    kind: str,
    targets: Targets | None,
    **parameters: object,
) -> Tensor:
    """The sum over positions of a loss of this kind at temperature 1."""
    section = SimpleNamespace(
        kind=kind, weight=1.0, temperature=1.0, times_temperature_squared=True, **parameters
    )
    head = Head(weight_VD)
    terms = terms_of([section])
    return token_losses(hidden_ND, head, label_N=label_N, terms=terms, targets=targets).loss


def targets_of(problem: Problem, task: str) -> Targets:
    """What the teacher ships in a task of `tests.benchmarks.losses`."""
    if task != "whole":
        return problem.shipped
    head = TeacherHead(Head(problem.teacher_VD), len(problem.teacher_VD))
    return TeacherStates(problem.teacher_ND, head)

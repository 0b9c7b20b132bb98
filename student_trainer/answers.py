"""How the losses read a teacher's answers: its arrays in a batch, and the view of each kind.

A batch names the arrays of an answer as its ask decodes them (`shared.targets.asks.ask`), so that
they tell of what kind it is.

N positions with loss   K ids kept per position   S temperatures   E teacher width   C classes
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.across.reading import matched
from student_trainer.losses.auxiliary.hidden_states import native_states
from student_trainer.losses.kernel.averaged import AveragedHeads, AveragedStates
from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.targets import SoftLabelTargets, Targets, TeacherTargets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates


@dataclass(frozen=True, slots=True)
class Reading:
    """What a view needs to know beside the arrays."""

    temperatures: tuple[float, ...]  # of the losses, that of the divergences last
    # Where last states are shipped, the teacher's LM head, or those of several that are averaged.
    teacher_head: TeacherHead | AveragedHeads | None = None
    renormalised: bool = False  # whether the mass of ids that are not kept is left out


def answer_arrays(targets: SoftTargets) -> dict[str, np.ndarray]:
    """The arrays of an answer by their names in a batch."""
    arrays = targets.arrays()
    found = arrays.kept | {"label_logprob_N": arrays.label_logprob_N}
    if arrays.entropy_N is not None:
        found["entropy_N"] = arrays.entropy_N
    hidden = {f"teacher_{layer}_NE": states for layer, states in arrays.hidden_ND.items()}
    return found | hidden


def view_of(batch: Mapping[str, Tensor], reading: Reading) -> Targets | None:
    """The teacher's part of a batch; None where it has none."""
    for name, view in VIEWS.items():
        if name in batch:
            return view(batch, reading)
    return None


def _likeliest(batch: Mapping[str, Tensor], reading: Reading) -> TeacherTargets:
    """Column s of the tails belongs to temperature s."""
    return TeacherTargets(
        batch["ids_NK"],
        batch["logprobs_NK"],
        batch["log_tail_NS"],
        reading.temperatures,
        batch["label_logprob_N"],
        reading.renormalised,
    )


def _drawn(batch: Mapping[str, Tensor], reading: Reading) -> DrawnTargets:
    """Drawn ids have one temperature, that of the divergences."""
    return DrawnTargets(
        batch["ids_NK"],
        batch["log_weights_NK"],
        batch["log_tail_NS"][:, 0],
        batch["entropy_N"],
        reading.temperatures[-1],
    )


def _classes(
    logprobs_NC: Tensor, batch: Mapping[str, Tensor], reading: Reading, view: type[TeacherTargets]
) -> TeacherTargets:
    """The classes are all that there is, at any temperature."""
    nothing_NS = logprobs_NC.new_full((len(logprobs_NC), len(reading.temperatures)), -torch.inf)
    return view(
        torch.arange(logprobs_NC.shape[1], device=logprobs_NC.device).expand(logprobs_NC.shape),
        logprobs_NC,
        nothing_NS,
        reading.temperatures,
        batch["label_logprob_N"],
    )


def _states(batch: Mapping[str, Tensor], reading: Reading) -> TeacherStates:
    assert isinstance(reading.teacher_head, TeacherHead), "the plan names the head of such answers"
    return TeacherStates(native_states(batch["teacher_last_NE"]), reading.teacher_head)


def averaged_states(number: int) -> str:
    """What the last states of one of several averaged teachers are called in a batch."""
    return f"averaged_{number}_NE"


def _averaged(batch: Mapping[str, Tensor], reading: Reading) -> AveragedStates:
    asked = reading.teacher_head
    assert isinstance(asked, AveragedHeads), "the plan names the heads of such answers"
    states = (native_states(batch[averaged_states(n)]) for n in range(len(asked.heads)))
    pairs = zip(states, asked.heads, strict=True)
    return AveragedStates(tuple(TeacherStates(*pair) for pair in pairs), asked.shares)


# By an array that answers of this kind alone have.
VIEWS: dict[str, Callable[[Mapping[str, Tensor], Reading], Targets]] = {
    "absent_NK": lambda batch, reading: matched(batch, reading.temperatures),
    "logprobs_NK": _likeliest,
    "log_weights_NK": _drawn,
    "class_logprobs_NC": lambda batch, reading: _classes(
        batch["class_logprobs_NC"], batch, reading, TeacherTargets
    ),
    "soft_labels_NC": lambda batch, reading: _classes(
        batch["soft_labels_NC"], batch, reading, SoftLabelTargets
    ),
    "teacher_last_NE": _states,
    averaged_states(0): _averaged,
}

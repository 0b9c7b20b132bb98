"""A teacher that is the student some steps ago, and what it goes with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from shared.config.base import Section
from shared.config.models.student import FullTraining, QLoRATraining, Student

if TYPE_CHECKING:
    from shared.config.models.teachers import Teacher
    from shared.config.run import Targets
    from shared.config.source import TokenSources


class FollowedStudent(Section):
    """Which student of the steps before teaches a step."""

    lag: int = Field(
        default=1,
        ge=0,
        description="steps between the student that answers and the step that learns from it, at "
        "least; 0: the student as it is, and it is waited for",
    )
    every: int = Field(
        default=1, ge=1, description="steps from one student that teaches to the next one"
    )

    def version(self, step: int) -> int:
        """The number of updates behind the student that teaches step `step`, from 0."""
        return max(0, step - self.lag) // self.every * self.every


def check_following(
    teachers: "Mapping[str, Teacher]",
    student: Student,
    targets: "Targets",
    source: "TokenSources",
    *,
    rollout_lag: int,
) -> None:
    """Raise ValueError for a teacher that is to follow the student and is not its model, or goes
    with what asks a teacher that stays as it is. `rollout_lag` is how many steps ahead a student
    that writes is asked about."""
    name = next((name for name, teacher in teachers.items() if teacher.follow_student), None)
    if name is None:
        return
    teacher, option = teachers[name], f"teachers.{name}.follow_student"
    followed = teacher.follow_student
    assert followed is not None, "it was looked for"
    if len(teachers) > 1:
        raise ValueError(
            f"{option} is set, whose answers move with the student, but teachers has "
            f"{len(teachers)}; keep one teacher, or leave it out"
        )
    _refuse_other_model(name, teacher, student)
    if targets.store is not None:
        raise ValueError(
            f"{option} is set, whose answers change as the student does, but targets.store is "
            f"{targets.store}, which keeps answers for any; remove one of the two"
        )
    if targets.exact is not None and isinstance(student.train, FullTraining):
        raise ValueError(
            f"{option} is set, but targets.exact is {targets.exact}, for which a teacher's head is "
            "shipped once, and that of a student whose every weight trains changes; set "
            "student.train to lora, or leave targets.exact out"
        )
    if source.teachers_write:
        raise ValueError(
            f"{option} is set, but source has a teacher that writes, which would be no student of "
            "a step; set source=student or source=dataset, or leave one of them out"
        )
    if source.writes and followed.lag < rollout_lag:
        raise ValueError(
            f"{option}.lag is {followed.lag}, but what the student writes is asked about "
            f"{rollout_lag} ahead (source.lag); raise it to {rollout_lag}, or lower source.lag"
        )


def _refuse_other_model(name: str, teacher: "Teacher", student: Student) -> None:
    nf4 = isinstance(student.train, QLoRATraining)
    asked = {
        "model": student.model,
        "revision": student.revision,
        "dtype": student.dtype,
        "attention": student.attention,
        "trust_remote_code": student.trust_remote_code,
        "quantisation": "nf4" if nf4 else "none",
    }
    for option, value in asked.items():
        found = getattr(teacher, option)
        if found != value:
            raise ValueError(
                f"teachers.{name}.follow_student is set, but teachers.{name}.{option} is {found}, "
                f"and the student has {value}; set it to that, or leave follow_student out"
            )


def why_unfollowing(teacher: "Teacher") -> str | None:
    """Why a teacher cannot have a student's weights, for the middle of a sentence; None: it can."""
    plain = {"engine": "transformers", "adapter": None, "tensor_parallel": 1}
    for option, value in plain.items():
        if (found := getattr(teacher, option)) != value:
            return f"{option} is {found}, whose weights are not laid out as a student's"
    if teacher.online_modules is not None:
        return "online_modules are set too, which would change what the student is"
    return None

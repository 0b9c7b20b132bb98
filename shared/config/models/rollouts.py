"""Who writes what the student writes: the workers that train it, or copies apart from them."""

from typing import Annotated

from pydantic import Field

from shared.config.base import Section
from shared.config.models.student import Student
from shared.config.models.teachers import Autoscaling, Teacher
from shared.config.source import TokenSources


class RolloutService(Section):
    """Copies of the student that write, each with the weights of the version it is asked for."""

    replicas: Annotated[int, Field(ge=0)] | Autoscaling = Field(
        default=0,
        description="copies of the student that write; 0: its workers do; with min, max and wait "
        "as many as steps need",
    )
    gpus: float | None = Field(
        default=None, ge=0, description="GPUs of one copy; null: as many as a worker"
    )
    cpus: float | None = Field(
        default=None, ge=0, description="CPUs of one copy; null: as many as a worker"
    )

    @property
    def serves(self) -> bool:
        """Whether copies write, and not the student's workers."""
        return self.replicas != 0

    @property
    def most(self) -> int:
        """Copies that there are at most."""
        return self.replicas.max if isinstance(self.replicas, Autoscaling) else self.replicas

    def served(self, student: Student) -> Teacher:
        """The copies as a service serves a model; `replicas` is not 0."""
        return Teacher(
            model=student.model,
            revision=student.revision,
            dtype=student.dtype,
            attention=student.attention,
            trust_remote_code=student.trust_remote_code,
            replicas=self.replicas,
            gpus=student.gpus if self.gpus is None else self.gpus,
            cpus=student.cpus if self.cpus is None else self.cpus,
        )


def check_rollouts(rollouts: RolloutService, source: TokenSources) -> None:
    """Raise ValueError for copies of a student that writes nothing, or parts of copies that are
    none."""
    for part in ("gpus", "cpus"):
        asked = getattr(rollouts, part)
        if asked is not None and not rollouts.serves:
            raise ValueError(
                f"rollouts.{part} is {asked:g}, but rollouts.replicas is 0, so that the student's "
                "workers write themselves; set rollouts.replicas=1, or leave it out"
            )
    if rollouts.serves and not source.writes:
        raise ValueError(
            f"rollouts.replicas is {rollouts.most}, but source has student 0, so that nothing is "
            "written; set source=student, or shares as {student: 0.5, dataset: 0.5}, or "
            "rollouts.replicas=0"
        )
    if rollouts.serves and source.teacher_mix:
        raise ValueError(
            f"source.teacher_mix is {source.teacher_mix:g}, with which the student's workers ask "
            f"the teacher for every token, but rollouts.replicas is {rollouts.most}, whose copies "
            "ask nobody; set rollouts.replicas=0, or leave teacher_mix out"
        )

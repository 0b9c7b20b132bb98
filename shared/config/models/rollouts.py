"""Who writes what the student writes: the workers that train it, or copies apart from them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.config.base import LocalPath, Section
from shared.config.models.engines import (
    ANSWERS_WITHIN_S,
    VLLM_DRAWS_AT,
    VLLM_RANKS,
    check_environment,
    draws_in_vllm,
)
from shared.config.models.student import LoRATraining, Student
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
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="what writes in a copy: transformers, or vllm in an environment of its own",
    )
    python: LocalPath | None = Field(
        default=None, description="Python of that environment, a path on its nodes, from / or ~"
    )

    @model_validator(mode="after")
    def _elsewhere(self) -> "RolloutService":
        check_environment(self.engine, self.python)
        return self

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
            engine=self.engine,
            python=self.python,
            replicas=self.replicas,
            gpus=student.gpus if self.gpus is None else self.gpus,
            cpus=student.cpus if self.cpus is None else self.cpus,
        )


def check_rollouts(
    rollouts: RolloutService, source: TokenSources, student: Student, *, waited_s: float
) -> None:
    """Raise ValueError for copies of a student that writes nothing, parts of copies that are none,
    or an engine that cannot write as the student. A batch of texts is waited for `waited_s`."""
    asked = {
        "gpus": None if rollouts.gpus is None else f"{rollouts.gpus:g}",
        "cpus": None if rollouts.cpus is None else f"{rollouts.cpus:g}",
        "engine": None if rollouts.engine == "transformers" else rollouts.engine,
    }
    for part, value in asked.items():
        if value is not None and not rollouts.serves:
            raise ValueError(
                f"rollouts.{part} is {value}, but rollouts.replicas is 0, so that the student's "
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
    if rollouts.engine != "vllm":
        return
    if (why := next(_beyond_vllm(source, student, waited_s=waited_s), None)) is not None:
        raise ValueError(
            f"rollouts.engine is vllm, {why}; change that, or set rollouts.engine=transformers"
        )


def _beyond_vllm(source: TokenSources, student: Student, *, waited_s: float) -> Iterator[str]:
    """Why vLLM cannot write as a student does."""
    least, most = VLLM_DRAWS_AT
    if not draws_in_vllm(source.temperature):
        yield (
            f"which draws at temperatures from {least:g} to {most:g}, or 0 for the likeliest, but "
            f"source.temperature is {source.temperature:g}"
        )
    if student.dtype != "float32":
        yield (
            "whose log-probabilities are proven to be the student's in float32 alone, but "
            f"student.dtype is {student.dtype}"
        )
    if student.attention != "auto":
        yield f"which has an attention of its own, but student.attention is {student.attention}"
    if student.upcycle is not None:
        yield "which loads models as they lie on disk, but student.upcycle makes another of it"
    train = student.train
    if train.kind == "qlora":
        yield "which has the base in student.dtype, but student.train.kind is qlora"
    if isinstance(train, LoRATraining) and train.r > VLLM_RANKS[-1]:
        yield f"which takes adapters up to rank {VLLM_RANKS[-1]}, but student.train.r is {train.r}"
    if waited_s > ANSWERS_WITHIN_S:
        yield (
            f"whose process is started again when it has not answered for {ANSWERS_WITHIN_S:g} s, "
            f"but service.unit_deadline_s is {waited_s:g}"
        )

"""LoRA modules on a teacher's side that learn beside its student, and what they go with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.config.base import Positive, Section

if TYPE_CHECKING:
    from shared.config.models.teachers import Teacher
    from shared.config.source import TokenSources
    from shared.config.targets import Targets


class TrainedModules(Section):
    """Online modules of a teacher (OKD, arXiv 2409.12512): low-rank adapters on a frozen model,
    with an optimiser of their own."""

    r: int = Field(default=8, ge=1, description="rank of each adapter")
    alpha: Positive = Field(default=16.0, description="their product is scaled by alpha / r")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear", description="linear layers of the decoder, by the ends of their names"
    )
    lr: float = Field(default=1e-4, ge=0, description="of AdamW on them; 0: frozen")
    eta: float = Field(
        default=0.5,
        ge=0,
        description="weight of their divergence from the student beside their hard labels",
    )
    divergence: Literal["forward_kl", "reverse_kl"] = Field(
        default="forward_kl",
        description="forward_kl: KL(student, teacher), or reverse_kl: KL(teacher, student)",
    )
    top_k: int = Field(
        default=64, ge=1, description="the student's likeliest ids of a position that they see"
    )
    lag: int | None = Field(
        default=None,
        ge=0,
        le=2,
        description="steps between the modules that answer and the step that learns from them; 0: "
        "the newest, and the teacher is waited for; null: 1 where steps are asked ahead",
    )


def check_modules(
    teachers: "Mapping[str, Teacher]",
    targets: "Targets",
    source: "TokenSources",
    *,
    most_ahead: int,
) -> None:
    """Raise ValueError for modules of a teacher that cannot train any, or whose answers would be
    asked of a store or about text that models write. `most_ahead` is how many steps are asked
    before the one under way."""
    name = next((name for name, teacher in teachers.items() if teacher.online_modules), None)
    if name is None:
        return
    teacher, option = teachers[name], f"teachers.{name}.online_modules"
    modules = teacher.online_modules
    assert modules is not None, "it was looked for"
    if len(teachers) > 1:
        raise ValueError(
            f"{option} is set, whose answers move with the student, but teachers has "
            f"{len(teachers)}; keep one teacher, or leave them out"
        )
    if targets.store is not None:
        raise ValueError(
            f"{option} is set, whose answers change with every step, but targets.store is "
            f"{targets.store}, which keeps answers for any; remove one of the two"
        )
    if not source.is_dataset:
        raise ValueError(
            f"{option} is set, which learns from the labels of rows, but source has "
            f"{source.written_in_words}; set source=dataset, or leave them out"
        )
    if modules.lag is not None and modules.lag > most_ahead:
        raise ValueError(
            f"{option}.lag is {modules.lag}, but steps are asked about at most {most_ahead} ahead "
            "(mixture.lag_steps, at most 2; none with targets.student_ids); lower it to "
            f"{most_ahead}"
        )


def why_untrainable(teacher: "Teacher") -> str | None:
    """Why a teacher's modules get no gradient, for the middle of a sentence; None: they do."""
    if teacher.engine != "transformers":
        return f"engine is {teacher.engine}, which forms no gradient; set engine=transformers"
    if teacher.quantisation != "none":
        return (
            f"quantisation is {teacher.quantisation}, whose products are rounded; set "
            "quantisation=none"
        )
    if teacher.tensor_parallel > 1:
        return (
            f"tensor_parallel is {teacher.tensor_parallel}, whose shards get no adapters; set "
            "tensor_parallel=1, with several gpus for layers one after the other"
        )
    return None


def as_loaded(teachers: "Mapping[str, Teacher]") -> "dict[str, Teacher]":
    """The same teachers, none of which changes while a student learns."""
    plain = {"online_modules": None, "follow_student": None}
    return {name: teacher.model_copy(update=plain) for name, teacher in teachers.items()}


def unserved(teachers: "Mapping[str, Teacher]") -> str:
    """The sentence for a command whose teacher others may ask too, or is not there."""
    for name, teacher in teachers.items():
        if teacher.online_modules:
            return (
                f"teachers.{name}.online_modules learn beside the student of one run, in replicas "
                "of its own, and nowhere else; use `tutelage run`, or leave them out"
            )
    (name,) = teachers
    return (
        f"teachers.{name}.follow_student gives it the weights of one run's student, in replicas of "
        "its own, and nowhere else; use `tutelage run`, or leave it out"
    )

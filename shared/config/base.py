"""What every section of the config is made of."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError


def _named(value: str) -> str:
    if not value.strip() or min(value) < " ":
        raise PydanticCustomError("name", "Value should be a name that can be read")
    return value


def _here(value: str) -> str:
    if "://" in value:
        raise PydanticCustomError("here", "Value should be a path of this machine, no address")
    return value


Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what every generator takes
Name = Annotated[str, AfterValidator(_named)]  # of a model, a file or what it has
LocalPath = Annotated[Name, AfterValidator(_here)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise PydanticCustomError("size", "Value should be less than 2**63, by its size")
        return value


class LossSection(Section):
    """What every loss declares."""

    asks_teacher: ClassVar[bool] = True  # whether it learns from the teacher
    reads_ids: ClassVar[bool] = False  # whether it compares both models at ids of a position
    # Whether it learns from what the student wrote alone, and how the teacher likes each token.
    of_rollouts: ClassVar[bool] = False
    # Whether it learns from pairs of a chosen and a rejected response.
    of_pairs: ClassVar[bool] = False
    # Whether the student also reads a copy of every text with embeddings moved against it.
    moves: ClassVar[bool] = False
    # Whether ids drawn from p alone give it without bias: it is linear in p.
    takes_drawn_ids: ClassVar[bool] = False
    # Where it sums over the student's distribution, so that the student's own ids tell it more:
    # "" always, a condition in words where `weighs_by_student` depends on its options; None: never.
    student_weighted: ClassVar[str | None] = None
    # Why a run has at most one of it; None: it may have several.
    single: ClassVar[str | None] = None

    @property
    def weighs_by_student(self) -> bool:
        """Whether it sums over the student's distribution with the options it has."""
        return self.student_weighted is not None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which it compares distributions, beside 1."""
        return ()

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Teacher layers whose hidden states it asks for."""
        return ()

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Student layers whose hidden states it reads."""
        return ()

    def in_phase(self, phase: int, *, phases: int) -> Self:
        """The loss as it counts in a phase of progressive distillation, counted from 0."""
        return self

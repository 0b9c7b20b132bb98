"""What a student is trained to do, and what a run must leave out for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from shared.config.base import Section
from shared.config.losses import CrossEntropy, Divergence
from shared.config.tasks.images import unseeing

if TYPE_CHECKING:
    from shared.config.run import Config

TEXT = "{text}"


class LanguageModel(Section):
    """Every position predicts the next token of its document."""

    classifies: ClassVar[bool] = False
    sees: ClassVar[bool] = False  # whether rows may have images
    unit: ClassVar[str] = "token"  # what a loss is per
    classes: ClassVar[Sequence[str]] = ()

    kind: Literal["language_model"] = "language_model"


class ImageText(LanguageModel):
    """Every position predicts the next token of its text, which images stand in."""

    sees: ClassVar[bool] = True

    kind: Literal["image_text"] = "image_text"  # type: ignore[assignment]


class Classification(Section):
    """Every row is a text and its class; the teacher, a causal language model, says how likely it
    would write the name of each class after the text (a verbaliser)."""

    classifies: ClassVar[bool] = True
    sees: ClassVar[bool] = False
    unit: ClassVar[str] = "row"

    kind: Literal["classification"] = "classification"
    labels: list[str] | None = Field(
        default=None,
        description="the classes, in their order; default: those of the training rows, sorted",
    )
    template: str = Field(
        default=TEXT, description="what the teacher reads, {text} being a row's text"
    )
    verbaliser: dict[str, str] = Field(
        default_factory=dict,
        description="class -> what the teacher would write for it; default: its own name",
    )
    calibration: Literal["none", "content_free"] = Field(
        default="none",
        description="content_free divides by what the teacher says of `content_free` "
        "(arXiv 2102.09690)",
    )
    content_free: str = Field(default="N/A", description="a text without content")

    @model_validator(mode="after")
    def _names_are_sound(self) -> "Classification":
        if TEXT not in self.template:
            raise ValueError(
                f"template is {self.template!r}, without {TEXT}, so that the teacher would not see "
                "the row; write {text} where it belongs"
            )
        labels = self.labels
        if labels is None:
            return self
        if len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels:
            raise ValueError(f"labels is {labels}; name two classes or more, each once")
        for name in self.verbaliser:
            if name not in labels:
                raise ValueError(f"verbaliser names {name}, which is not among labels; remove it")
        return self

    @property
    def classes(self) -> list[str]:
        """The classes, once they are known."""
        assert self.labels is not None, "a config that can run names them"
        return self.labels

    def said(self, label: str) -> str:
        """What the teacher would write for a class."""
        return self.verbaliser.get(label, label)


def _by_name(value: Any) -> Any:
    """A task by its kind alone."""
    return {"kind": value} if isinstance(value, str) else value


Task = Annotated[
    Annotated[LanguageModel | ImageText | Classification, Field(discriminator="kind")],
    BeforeValidator(_by_name),
]


def check_task(config: "Config") -> None:
    """Raise ValueError for what has no meaning in the task of a config, with the way out."""
    kind = config.task.kind
    for field, task in {"label": "classification", "images": "image_text"}.items():
        for name, domain in config.domains.items():
            if field in domain.columns and kind != task:
                raise ValueError(
                    f"domains.{name}.columns names {field}, but task is {kind}, which reads none; "
                    f"set task={task}, or remove it"
                )
    if config.task.classifies:
        for said, way_out in _meaningless(config):
            raise ValueError(f"task is classification, but {said}; {way_out}")
    if config.task.sees:
        for said, way_out in unseeing(config):
            raise ValueError(f"task is image_text, but {said}; {way_out}")


def _meaningless(config: "Config") -> list[tuple[str, str]]:
    found = [*_of_losses(config.losses), *_of_teachers(config), *_of_rows(config)]
    targets = config.targets
    if targets.exact is not None:
        found.append((f"targets.exact is {targets.exact}, and classes are exact", "remove it"))
    if targets.student_ids:
        found.append(("targets.student_ids is set, and all classes are told", "remove it"))
    if targets.selector != "auto":
        told = f"targets.selector is {targets.selector}, and all classes are told"
        found.append((told, "remove it"))
    if config.evaluation.kl == "bucketed":
        found.append(("evaluation.kl is bucketed, and all classes are told", "remove it"))
    if config.student.train.kind == "qlora":
        found.append(
            ("student.train.kind is qlora, which quantises a head that trains", "take lora or full")
        )
    if config.cross_tokenizer is not None:
        told = f"cross_tokenizer is {config.cross_tokenizer}, and the teacher reads its own tokens"
        found.append((told, "remove it"))
    if config.student.upcycle is not None:
        found.append(("student.upcycle is set, of language models", "remove it"))
    if config.progressive is not None:
        found.append(("progressive is set, whose phases are of tokens", "remove it"))
    if config.weighting.scored_centre is not None:
        told = f"weighting.centre is {config.weighting.scored_centre}, a statistic of tokens"
        found.append((told, "set it to running or a number"))
    return found


def _of_losses(losses: Sequence[Any]) -> list[tuple[str, str]]:
    odd = [one.kind for one in losses if not isinstance(one, CrossEntropy | Divergence)]
    return [(f"losses has a {kind}, of language models", "take it out") for kind in odd]


def _of_teachers(config: "Config") -> list[tuple[str, str]]:
    found = []
    for name, teacher in config.teachers.items():
        named = f"teachers.{name}"
        if teacher.engine == "vllm":
            found.append((f"{named}.engine is vllm", "set it to transformers"))
        for option in ("online_modules", "follow_student"):
            if getattr(teacher, option) is not None:
                found.append((f"{named}.{option} is set, of language models", "remove it"))
    for name, domain in config.domains.items():
        if isinstance(domain.teacher, dict):
            found.append((f"domains.{name}.teacher averages several", "name one of them"))
    return found


def _of_rows(config: "Config") -> list[tuple[str, str]]:
    found = []
    if not config.source.is_dataset:
        found.append(("source has text that models write, which has no class", "remove it"))
    if config.prompts is not None:
        found.append(("prompts is set", "write what the teacher is shown in task.template"))
    if config.data.too_long == "split_with_prompt":
        found.append(("data.too_long is split_with_prompt", "set it to cut, drop or refuse"))
    for name, domain in config.domains.items():
        odd = sorted(set(domain.columns) - {"text", "label"})
        if odd:
            found.append((f"domains.{name}.columns names {odd[0]}", "name text and label alone"))
    return found

"""What a student is trained to do, and what a run must leave out for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from shared.config.base import Section
from shared.config.losses import CrossEntropy, Divergence
from shared.config.tasks.images import unseeing
from shared.config.tasks.marks import unmarked, without_validation

if TYPE_CHECKING:
    from shared.config.run import Config

TEXT, TYPE = "{text}", "{type}"
OUTSIDE = "O"  # the tag of a word that no entity holds
# Columns of a domain that are read in one task alone.
OF_TASKS = {
    "label": ("classification",),
    "entities": ("tagging", "marking"),
    "images": ("image_text",),
}


class LanguageModel(Section):
    """Every position predicts the next token of its document."""

    classifies: ClassVar[bool] = False
    sees: ClassVar[bool] = False  # whether rows may have images
    unit: ClassVar[str] = "token"  # what a loss is per
    classes: ClassVar[Sequence[str]] = ()

    columns: ClassVar[tuple[str, ...]] = ()

    kind: Literal["language_model"] = "language_model"


class ImageText(LanguageModel):
    """Every position predicts the next token of its text, which images stand in."""

    sees: ClassVar[bool] = True

    kind: Literal["image_text"] = "image_text"  # type: ignore[assignment]


class OfEntities(Section):
    """A task of entities in texts."""

    types: list[str] | None = Field(
        default=None,
        description="types of entities, in their order; default: those of training rows, sorted",
    )
    shots: int | None = Field(
        default=None,
        ge=1,
        description="of each domain train on rows with so many entities of each type, drawn; "
        "default: on all",
    )
    episode: int = Field(default=0, ge=0, description="the seed by which rows of `shots` are drawn")

    @model_validator(mode="after")
    def _types_are_sound(self) -> Self:
        types = self.types
        if types is not None and (not types or len(set(types)) < len(types) or "" in types):
            raise ValueError(f"types is {types}; name one or more, each once")
        return self

    @property
    def known_types(self) -> list[str]:
        """The types, once they are known."""
        assert self.types is not None, "a config that can run names them"
        return self.types


class Marking(OfEntities, LanguageModel):
    """A causal language model writes a text again, the entities of one type marked `<<< X >>>`.

    One row asks about one type (CLLMFS, arXiv 2408.12834). Like any row of a language model it may
    be learnt from a teacher too.
    """

    columns: ClassVar[tuple[str, ...]] = ("text", "entities")

    kind: Literal["marking"] = "marking"  # type: ignore[assignment]
    template: str = Field(
        default="Mark each {type} in this text with <<< and >>>: {text}",
        description="of task marking the prompt, {type} being a type and {text} a row's text",
    )

    @model_validator(mode="after")
    def _template_asks(self) -> Self:
        if self.template.count(TEXT) != 1 or TYPE not in self.template:
            raise ValueError(
                f"template is {self.template!r}, without {TYPE}, or without one {TEXT}, so that "
                "the student would not know what to mark; write both where they belong"
            )
        return self


class Verbalised(Section):
    """A task of classes; a teacher that is a causal language model says how likely it would write
    the name of each after a text (a verbaliser)."""

    classifies: ClassVar[bool] = True
    sees: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]]  # of a domain, that rows are read by

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
    def _template_shows_the_row(self) -> Self:
        if TEXT not in self.template:
            raise ValueError(
                f"template is {self.template!r}, without {TEXT}, so that the teacher would not see "
                "the row; write {text} where it belongs"
            )
        return self

    def said(self, label: str) -> str:
        """What the teacher would write for a class."""
        return self.verbaliser.get(label, label)


class Classification(Verbalised):
    """Every row is a text and its class."""

    unit: ClassVar[str] = "row"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")

    kind: Literal["classification"] = "classification"
    labels: list[str] | None = Field(
        default=None,
        description="the classes, in their order; default: those of the training rows, sorted",
    )

    @model_validator(mode="after")
    def _names_are_sound(self) -> Self:
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


class Tagging(OfEntities, Verbalised):
    """Every word of a row is outside, at the beginning of or inside an entity of some type (BIO).

    The teacher reads the text once for each word, which is marked in it, and says how likely it
    would write the name of each tag. So the student learns probabilities of tags and not only what
    the teacher would mark, through the payload of classes, at the price of a reading per word.
    """

    unit: ClassVar[str] = "word"
    columns: ClassVar[tuple[str, ...]] = ("text", "entities")

    kind: Literal["tagging"] = "tagging"

    @model_validator(mode="after")
    def _tags_are_known(self) -> Self:
        for name in self.verbaliser if self.types is not None else ():
            if name not in self.classes:
                raise ValueError(f"verbaliser names {name}, which is no tag of types; remove it")
        return self

    @property
    def classes(self) -> list[str]:
        """The tags, once the types are known: O, then B and I of each type."""
        return tags_of(self.known_types)

    def said(self, label: str) -> str:
        """What the teacher would write for a tag: of O `none`, else the type, with I `inside`."""
        if label in self.verbaliser:
            return self.verbaliser[label]
        if label == OUTSIDE:
            return "none"
        part, _, name = label.partition("-")
        return name if part == "B" else f"inside {name}"


def tags_of(types: Sequence[str]) -> list[str]:
    """The tags of types of entities, in order."""
    return [OUTSIDE, *(f"{part}-{name}" for name in types for part in "BI")]


def _by_name(value: Any) -> Any:
    """A task by its kind alone."""
    return {"kind": value} if isinstance(value, str) else value


Task = Annotated[
    Annotated[
        LanguageModel | ImageText | Classification | Tagging | Marking,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_by_name),
]


def check_task(config: "Config") -> None:
    """Raise ValueError for what has no meaning in the task of a config, with the way out."""
    kind = config.task.kind
    for field, tasks in OF_TASKS.items():
        for name, domain in config.domains.items():
            if field in domain.columns and kind not in tasks:
                raise ValueError(
                    f"domains.{name}.columns names {field}, but task is {kind}, which reads none; "
                    f"set task={tasks[0]}, or remove it"
                )
    if config.task.classifies:
        for said, way_out in _meaningless(config):
            raise ValueError(f"task is {kind}, but {said}; {way_out}")
    if config.task.sees:
        for said, way_out in unseeing(config):
            raise ValueError(f"task is image_text, but {said}; {way_out}")
    for said, way_out in unmarked(config):
        raise ValueError(f"task is {kind}, but {said}; {way_out}")


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
        read = config.task.columns
        if odd := sorted(set(domain.columns) - set(read)):
            told = f"domains.{name}.columns names {odd[0]}"
            found.append((told, f"name {' and '.join(read)} alone"))
    return found + _of_tags(config)


def _of_tags(config: "Config") -> list[tuple[str, str]]:
    task, found = config.task, []
    if not isinstance(task, Tagging):
        return found
    if task.shots is not None:
        found += without_validation(config, said=f"task.shots is {task.shots} and ")
    if config.student.model == "tiny":
        found.append(("student.model is tiny, which reads whole texts", "name another student"))
    return found

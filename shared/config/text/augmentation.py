"""Documents of the training text changed by rules and by the teacher, for it to label."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from shared.config.base import Fraction, Section

if TYPE_CHECKING:
    from shared.config.run import Config


class Augmentation(Section):
    """Which share of documents is changed, anew in every epoch, and how
    (`shared.data.augmented.augmenting`).

    What the teacher says of a changed document is learnt, its text is not: losses that ask no
    teacher leave it out. With `mask` the teacher itself puts other tokens in the places of some,
    which it is asked for before training starts (`cluster.launch.teachers.filling`).
    """

    share: Fraction = Field(
        default=0.0, description="share of documents that are changed, for the teacher to label"
    )
    mask: Fraction = Field(
        default=0.0, description="share of their tokens masked, for the teacher to fill"
    )
    candidates: int = Field(
        default=8, ge=1, le=1024, description="likeliest ids that the teacher draws a fill from"
    )
    copies: int = Field(
        default=1,
        ge=1,
        description="fillings of a document, which take turns from epoch to epoch",
    )
    across: bool = Field(
        default=True,
        description="whether the teacher reads text of another domain before what it fills",
    )
    replace: Fraction = Field(
        default=0.1, description="share of their tokens replaced by those of another domain's text"
    )
    swap: Fraction = Field(default=0.1, description="share of their tokens that change places")
    delete: Fraction = Field(default=0.1, description="share of their tokens left out")

    @property
    def applies(self) -> bool:
        """Whether any document is changed."""
        return self.share > 0

    @property
    def fills(self) -> bool:
        """Whether the teacher fills masks in any document."""
        return self.applies and self.mask > 0

    @property
    def by_rules(self) -> "Augmentation":
        """As many tokens changed without asking a teacher, at the same cost of a step."""
        changed = {"mask": 0.0, "copies": 1, "replace": max(self.mask, self.replace)}
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _something_changes(self) -> "Augmentation":
        if self.applies and not (self.mask or self.replace or self.swap or self.delete):
            raise ValueError(
                f"augmentation.share is {self.share:g}, but mask, replace, swap and delete are 0, "
                "so that nothing would change; raise one of them, or leave augmentation out"
            )
        if self.copies > 1 and not self.mask:
            raise ValueError(
                f"augmentation.copies is {self.copies}, but augmentation.mask is 0, so that the "
                "teacher fills nothing; raise mask, or leave copies out"
            )
        return self


def check_augmentation(config: "Config") -> None:
    """Raise ValueError where documents cannot be changed, or nobody would label them."""
    weighting, augmentation = config.weighting, config.augmentation
    if not augmentation.applies:
        if weighting.selects:
            raise ValueError(
                f"weighting.policy is {weighting.policy}, which selects among changed documents, "
                "but augmentation.share is 0; raise it, or take another policy"
            )
        return
    said = f"augmentation.share is {augmentation.share:g}"
    if not config.needs_teacher:
        raise ValueError(
            f"{said}, but no loss asks a teacher, and nobody else labels what is changed; add a "
            "divergence to losses, or leave augmentation out"
        )
    for found, way_out in _unfit(config):
        raise ValueError(f"{said}, but {found}; {way_out}, or leave augmentation out")


def _unfit(config: "Config") -> list[tuple[str, str]]:
    """What has no meaning beside changed documents, and the way out."""
    found = []
    if config.task.classifies:
        found.append(("task is classification, whose texts are read whole", "set another task"))
    if config.task.sees:
        found.append(("task is image_text, whose images stand in the text", "set another task"))
    if not config.source.is_dataset:
        found.append((f"source has {config.source.written_in_words}", "set source=dataset"))
    if config.cross_tokenizer is not None:
        told = f"cross_tokenizer is {config.cross_tokenizer}, whose teacher has rows of its own"
        found.append((told, "remove it"))
    if config.targets.teacher_free:
        told = "targets.teacher_free leaves no teacher to label what is changed"
        found.append((told, "remove it"))
    for name, domain in config.domains.items():
        if "teacher_prompt" in domain.columns:
            told = f"domains.{name}.columns names a teacher_prompt, found by the text after it"
            found.append((told, "remove it"))
    if any(loss.kind == "preference" for loss in config.losses):
        found.append(("losses has a preference, whose responses come in pairs", "take it out"))
    return found

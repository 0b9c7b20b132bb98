"""What a run whose student marks entities must leave out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.config.run import Config

Said = tuple[str, str]  # what of a config has no meaning, and the way out


def unmarked(config: "Config") -> Iterator[Said]:
    """What of a config knows no marked entities; of another task, what needs some."""
    contrasts = any(loss.kind == "entity_contrast" for loss in config.losses)
    if config.task.kind != "marking":
        if contrasts:
            yield "losses has an entity_contrast, of marked entities", "set task=marking"
        return
    if config.student.zero == 3:
        told = "student.zero is 3, and a student that writes, or reads a moved copy, is whole"
        yield f"{told} on each worker", "set it to 2 or less"
    if contrasts and len(config.teachers) > 1:
        yield f"losses has an entity_contrast and teachers has {len(config.teachers)}", "keep one"
    if not config.source.is_dataset:
        yield "source has text that models write, without marks", "set source=dataset"
    if any(loss.of_pairs for loss in config.losses):
        yield "losses has a preference, whose rows are pairs", "take it out"
    if config.augmentation.applies:
        yield "augmentation changes what is to be copied", "leave it out"
    if config.active is not None:
        yield "active is set, whose teachers write no marks", "leave it out"
    if config.cross_tokenizer is not None:
        told = f"cross_tokenizer is {config.cross_tokenizer}, of plain text"
        yield told, "leave it out"
    if config.data.loss_on != "responses":
        yield f"data.loss_on is {config.data.loss_on}", "set data.loss_on=responses"
    if config.data.too_long in ("cut", "split_with_prompt"):
        told = f"data.too_long is {config.data.too_long}, and a copy is whole"
        yield told, "set data.too_long=drop or refuse"
    yield from without_validation(config)
    for name, domain in config.domains.items():
        if odd := sorted(set(domain.columns) - set(config.task.columns)):
            told = f"domains.{name}.columns names {odd[0]}"
            yield told, f"name {' and '.join(config.task.columns)} alone"


def without_validation(config: "Config", *, said: str = "") -> Iterator[Said]:
    """Domains whose validation rows would be held out of few, or of what has the same text."""
    for name, domain in config.domains.items():
        if domain.validation is None:
            yield f"{said}domains.{name} has no validation", "name some"

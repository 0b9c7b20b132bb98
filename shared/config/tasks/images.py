"""What a run whose rows have images must leave out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.config.run import Config


def unseeing(config: "Config") -> Iterator[tuple[str, str]]:
    """What of a config knows of text alone, and the way out."""
    for name, teacher in config.teachers.items():
        named = f"teachers.{name}"
        if teacher.engine != "transformers":
            yield f"{named}.engine is {teacher.engine}", "set it to transformers"
        if teacher.tensor_parallel > 1:
            yield f"{named}.tensor_parallel is {teacher.tensor_parallel}", "leave it at 1"
        for option in ("online_modules", "follow_student"):
            if getattr(teacher, option) is not None:
                yield f"{named}.{option} reads text alone", "leave it out"
    for name, domain in config.domains.items():
        if "teacher_prompt" in domain.columns:
            yield f"domains.{name}.columns has a teacher_prompt", "leave it out"
    if not config.source.is_dataset:
        yield "source has text that models write, without images", "set source=dataset"
    if config.prompts is not None:
        yield f"prompts is {config.prompts}, before text alone", "leave prompts out"
    if config.cross_tokenizer is not None:
        told = f"cross_tokenizer is {config.cross_tokenizer}, which translates text alone"
        yield told, "leave it out"
    if config.active is not None:
        yield "active is set, whose teachers write text alone", "leave it out"
    if config.data.too_long not in ("drop", "refuse"):
        told = f"data.too_long is {config.data.too_long}, and an image is never cut"
        yield told, "set data.too_long=drop or refuse"

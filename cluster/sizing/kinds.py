"""What the models of a run are by its task: their parts, and what they read beside text."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from shared.config.models.student import Student
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.images.processor import SIZES, blank_image, image_processor
from shared.loading import classes_of, head_of, is_classifier, read_config
from shared.model_parts import decoder_of, seeing_part_of
from student_trainer.models import bag  # noqa: F401  # transformers then builds it
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.registry import task_of
from student_trainer.tasks.task import ModelKind


def teacher_kind(config: Config, asked: Teacher) -> ModelKind:
    """What a teacher of a run is: of classes a language model, or a classifier of its own."""
    if not config.task.classifies:
        return task_of(config).model
    named = {"revision": asked.revision, "trust_remote_code": asked.trust_remote_code}
    if not is_classifier(asked.model, **named):
        return CAUSAL_LM.model
    own, kind = read_config(asked.model, **named, attention="auto"), task_of(config).model
    return replace(kind, auto_class=f"AutoModel{head_of(own)}", labels=classes_of(own) or ())


def with_classes(config: Any, kind: ModelKind) -> Any:
    """A config of transformers with as many classes as a classifier tells apart, and an id that is
    none of a text's, as those need who read its last one."""
    if kind.labels:
        config.num_labels = len(kind.labels)
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = 0
    return config


def parts_of(model: Any, kind: ModelKind, *, option: str, name: str) -> tuple[nn.Module, nn.Linear]:
    """What turns tokens into what the head reads, and the head; of a classifier all of it, and the
    identity on its logits. Raises ConfigError."""
    if kind.labels:
        size = len(kind.labels)
        return model, nn.Linear(size, size, bias=False, dtype=model.dtype).requires_grad_(False)
    decoder = (seeing_part_of if kind.sees else decoder_of)(model)
    head = model.get_output_embeddings()
    if kind.sees and decoder is None:
        raise ConfigError(
            f"{option}: {name} has no part that takes the pixels of images; choose another model"
        )
    if decoder is None or not isinstance(head, nn.Linear):
        raise ConfigError(f"{option}: {name} has no decoder with a linear output head")
    return decoder, head


def pixels_of(
    model: Any, asked: Student | Teacher, kind: ModelKind, *, lines: int
) -> dict[str, np.ndarray]:
    """What a model reads of the blank image in each of some lines, by its own names; nothing of one
    that sees none. Raises ConfigError for a model without a processor."""
    if not kind.sees:
        return {}
    processor = image_processor(asked.model, asked.revision, trusted=asked.trust_remote_code)
    read = inspect.signature(model.get_image_features).parameters
    found = processor.pixels([[blank_image()]] * lines)
    return {name: array for name, array in found.items() if name in read}


def image_note(config: Config) -> str:
    """What rows with images are counted as."""
    asked = config.student
    processor = image_processor(asked.model, asked.revision, trusted=asked.trust_remote_code)
    (width, height), count = SIZES[0], len(processor.blank_ids())
    return (
        f"every row counts with one image of {width} x {height}, which stands in {count} of its "
        "tokens"
    )

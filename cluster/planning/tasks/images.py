"""The processors of a run whose rows have images."""

import numpy as np

from shared.config.models.student import Student
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError, HandshakeError
from shared.images.processor import ImageProcessor, differing_places, image_processor


def seen_alike(config: Config) -> ImageProcessor:
    """The student's processor. Raises ConfigError for a model that has none, HandshakeError for a
    teacher that has other tokens in the place of an image."""
    own = _processor(config.student)
    for name, teacher in config.teachers.items():
        found = differing_places(_processor(teacher), own)
        if found is not None and not config.targets.teacher_free:
            (width, height), *places = found
            teachers, students = map(_in_words, places)
            raise HandshakeError(
                f"an image of {width} x {height} stands in {teachers} for teachers.{name} "
                f"{teacher.model} and in {students} for the student {config.student.model}; take "
                "models whose processors agree on tokens and sizes"
            )
    return own


def _in_words(ids: np.ndarray) -> str:
    """How many tokens, and which."""
    kinds = ", ".join(map(str, dict.fromkeys(ids.tolist())))
    return f"{len(ids)} tokens (ids {kinds:.60})"


def refuse_images(config: Config, verb: str, way_out: str) -> None:
    """Raise ConfigError where a verb that reads text alone is called for rows with images."""
    if config.task.sees:
        raise ConfigError(f"task is image_text, and {verb} reads text alone; {way_out}")


def _processor(asked: Student | Teacher) -> ImageProcessor:
    return image_processor(asked.model, asked.revision, trusted=asked.trust_remote_code)

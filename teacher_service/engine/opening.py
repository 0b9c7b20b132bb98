"""The engine of a teacher whose weights this process computes with."""

from shared.config.models.teachers import Teacher
from shared.loading import is_classifier
from teacher_service.engine.audit import load_engine
from teacher_service.engine.classes.classifier import ClassifierEngine
from teacher_service.engine.description import Engine


def open_engine(teacher: Teacher, *, cache: str | None, context: int | None) -> Engine:
    """As its config.json says that it is: a classifier, or a causal language model, see
    `load_engine`. Raises ConfigError."""
    asked = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    if is_classifier(teacher.model, **asked):
        return ClassifierEngine.load(teacher)
    return load_engine(teacher, cache=cache, context=context)

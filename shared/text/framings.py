"""How rows become token ids in a task that classifies."""

from shared.config.tasks.task import Classification, LanguageModel, Tagging
from shared.text.classified import ClassFraming
from shared.text.tagged import TagFraming

TaskFraming = ClassFraming | TagFraming


def framing_of(task: LanguageModel | Classification | Tagging) -> TaskFraming | None:
    """That of a task whose classes are known; None of language models."""
    if isinstance(task, Tagging):
        return TagFraming(tuple(task.classes), task.shots, task.episode)
    return ClassFraming(tuple(task.classes)) if isinstance(task, Classification) else None

"""How rows become token ids in a task that reads more of them than text."""

from shared.config.run import Config
from shared.config.tasks.task import Classification, Marking, Tagging
from shared.prompts.marking import MarkFraming
from shared.text.classified import ClassFraming
from shared.text.tagged import TagFraming

TaskFraming = ClassFraming | TagFraming | MarkFraming


def framing_of(config: Config) -> TaskFraming | None:
    """That of a task whose classes, or types, are known; None of plain text."""
    task, data = config.task, config.data
    if isinstance(task, Tagging):
        return TagFraming(tuple(task.classes), task.shots, task.episode)
    if isinstance(task, Marking):
        told = (data.loss_on, data.special_tokens, task.shots, task.episode)
        return MarkFraming(tuple(task.known_types), task.template, *told)
    return ClassFraming(tuple(task.classes)) if isinstance(task, Classification) else None

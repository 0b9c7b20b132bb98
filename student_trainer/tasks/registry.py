"""The task of a config."""

from shared.config.run import Config
from shared.config.tasks.task import Classification as ClassificationConfig
from shared.config.tasks.task import Marking as MarkingConfig
from shared.config.tasks.task import Tagging as TaggingConfig
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.tasks.classification import Classification
from student_trainer.tasks.image_text import ImageText
from student_trainer.tasks.marking import Marking
from student_trainer.tasks.tagging import Tagging
from student_trainer.tasks.task import Task


def task_of(config: Config) -> Task:
    """What a config's student is trained to do."""
    if isinstance(config.task, ClassificationConfig):
        return Classification(tuple(config.task.classes))
    if isinstance(config.task, TaggingConfig):
        return Tagging(tuple(config.task.classes))
    asked = config.student
    if isinstance(config.task, MarkingConfig):
        task, model = config.task, (asked.model, asked.revision, asked.trust_remote_code)
        return Marking(tuple(task.known_types), task.template, *model)
    if config.task.sees:
        return ImageText(asked.model, asked.revision, asked.trust_remote_code)
    return CAUSAL_LM

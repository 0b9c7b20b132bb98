"""A teacher without a model: soft labels from how alike the classes' texts are, and what it goes
with."""

from typing import TYPE_CHECKING

from pydantic import Field

from shared.config.base import Section

if TYPE_CHECKING:
    from shared.config.models.teachers import Teacher
    from shared.config.run import Config


class Similarity(Section):
    """Class similarities of ReffAKD (arXiv 2404.09886), with its published code's values for 100
    classes; `teacher_service.engine.classes.similarity` has the equations."""

    samples: int = Field(default=40, ge=2, description="training rows of a class at most")
    diagonal: float = Field(
        default=0.0225, ge=0, description="added to the similarity of a class to itself"
    )
    passes: int = Field(default=200, ge=1, description="of the autoencoder over the training rows")


def why_unlike(teacher: "Teacher") -> str | None:
    """What an engine without a model is not asked for, and the way out; None: nothing."""
    plain = {"adapter": None, "quantisation": "none", "attention": "auto", "tensor_parallel": 1}
    plain |= {"gpus": 0.0, "python": None}
    for option, value in plain.items():
        if getattr(teacher, option) != value:
            return f"{option} is {getattr(teacher, option)}, of teachers that are models"
    return None


def check_similarity(config: "Config") -> None:
    """Raise ValueError where a teacher without a model is asked for more than soft labels of
    training rows."""
    name = next((name for name, t in config.teachers.items() if t.engine == "similarity"), None)
    if name is None:
        return
    contradictions = {
        f"task is {config.task.kind}; set task=classification": (
            config.task.kind != "classification"
        ),
        f"teachers has {len(config.teachers)}, and nothing of it is comparable with others; keep "
        "one": len(config.teachers) > 1,
        "targets.teacher_free is set, and there is no teacher to be without; leave it out": (
            config.targets.teacher_free
        ),
        f"mixture.policy is {config.mixture.policy}, which compares with a teacher; take a fixed "
        "mixture": config.mixture.policy != "fixed",
    }
    for said, found in contradictions.items():
        if found:
            raise ValueError(
                f"teachers.{name}.engine is similarity, soft labels of classes from no model, but "
                f"{said}"
            )

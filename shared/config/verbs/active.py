"""How `tutelage active` teaches in rounds; a single run reads none of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared.config.base import Section
from shared.config.domains import Domain
from shared.config.models.engines import VLLM_DRAWS_AT, draws_in_vllm

if TYPE_CHECKING:
    from shared.config.models.teachers import Teacher

LONGEST_NAME = 180  # of an active run, whose rounds have names of their own


class Rounds(Section):
    """What all methods share: rounds of training, evaluating, choosing, asking and filtering."""

    domain: str | None = Field(
        default=None, description="the one that grows; default: the only one with prompts"
    )
    instruction: str | None = Field(
        default=None, description="what the rows are, in a sentence for the teacher"
    )
    rounds: int = Field(default=10, ge=1, description="in which the teacher writes, at most")
    patience: int = Field(
        default=5, ge=1, description="rounds without a better student after which it ends"
    )
    budget_tokens: int = Field(
        default=1_000_000,
        ge=1,
        description="tokens that the teacher reads and writes in all rounds, at most",
    )
    start: Literal["best", "base"] = Field(
        default="best",
        description="a round's student at first: that of the best round so far, or `student.model`",
    )
    metric: Literal["accuracy", "loss"] = Field(
        default="accuracy",
        description="what the best round is best in: right answers, or the loss on validation text",
    )
    train_prompts: int = Field(
        default=512, ge=1, description="training prompts that a round's student answers"
    )
    validation_prompts: int = Field(
        default=256, ge=1, description="validation prompts that every round's student answers"
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="tokens of one answer of the teacher, at most"
    )
    temperature: float = Field(default=0.7, ge=0, description="at which the teacher writes")


class PGKD(Rounds):
    """New rows for the classes that the student is weak in or mixes up (PGKD, arXiv 2411.05045).

    A class is a response. Defaults of the prompt's parts are those of the public implementation;
    `cluster.active.pgkd` has the prompt.
    """

    method: Literal["pgkd"] = "pgkd"
    max_classes: int = Field(default=400, ge=2, description="different responses, at most")
    prompts: int = Field(default=1, ge=1, description="prompts of a round")
    rows: int = Field(default=16, ge=1, description="rows that a prompt asks for")
    shots: int = Field(default=16, ge=1, description="training rows in every prompt")
    correct: int = Field(default=16, ge=0, description="rows in a prompt that are answered rightly")
    incorrect: int = Field(default=16, ge=0, description="rows in a prompt answered wrongly")
    hard_negatives: int = Field(
        default=16, ge=0, description="rows in a prompt answered wrongly with the most confidence"
    )
    report_classes: int = Field(
        default=32, ge=1, description="classes in a prompt's report, those of the lowest F1"
    )


class ELAD(Rounds):
    """The teacher reads explanations that the student is unsure of, step by step, and rewrites them
    from the first wrong step on (ELAD, arXiv 2402.13098).

    `cluster.active.chains` has the scores, which are reconstructed.
    """

    method: Literal["elad"] = "elad"
    train_prompts: int = Field(
        default=64, ge=1, description="training prompts that a round's student answers"
    )
    questions: int = Field(
        default=8, ge=1, description="explanations that the teacher reads in a round"
    )
    samples: int = Field(
        default=5, ge=2, description="answers that a student draws after each of its steps"
    )
    sample_temperature: float = Field(default=0.7, ge=0, description="at which it draws them")
    answer_marker: str = Field(
        default="####",
        min_length=1,
        description="what stands before the answer in an explanation; without it, the last line "
        "is the answer",
    )


Active = Annotated[PGKD | ELAD, Field(discriminator="method")]


def check_active(
    active: Active | None,
    *,
    name: str,
    domains: Mapping[str, Domain],
    teachers: "Mapping[str, Teacher]",
) -> None:
    """Raise ValueError where rounds cannot be made as asked, whatever the text is."""
    if active is None:
        return
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"name has {len(name)} characters, and rounds are named after it; take {LONGEST_NAME} "
            "at most"
        )
    if active.domain is not None and active.domain not in domains:
        raise ValueError(
            f"active.domain is {active.domain}, which is none of the domains {', '.join(domains)}; "
            "name the domain as there"
        )
    if active.budget_tokens <= active.max_new_tokens:
        raise ValueError(
            f"active.budget_tokens is {active.budget_tokens}, of which one answer may take "
            f"active.max_new_tokens {active.max_new_tokens}, and its prompt more; raise the first, "
            "or lower the second"
        )
    vllm = next((name for name, teacher in teachers.items() if teacher.engine == "vllm"), None)
    if vllm is not None and not draws_in_vllm(active.temperature):
        least, most = VLLM_DRAWS_AT
        raise ValueError(
            f"teachers.{vllm}.engine is vllm, which draws at temperatures from {least:g} to "
            f"{most:g}, or 0 for the likeliest, but active.temperature is {active.temperature:g}; "
            f"change that, or set teachers.{vllm}.engine=transformers"
        )

"""Losses in which a step decides, from how both models do on its tokens, how each is learnt."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config.base import Fraction, LossSection, Positive

if TYPE_CHECKING:
    from shared.config.run import Config


class ATKD(LossSection):
    """Token-adaptive teaching (ATKD, arXiv 2402.11890): hard tokens learn TKD + DKD, easy ones DKD.

    Defaults are the paper's. Hard are the tokens of a step where the teacher is least certain of
    the label; `reverse` swaps the roles of teacher and student, for the split too, so that the
    student reads every row once more before it learns. Temperature 1.
    """

    reads_ids: ClassVar[bool] = True
    student_weighted: ClassVar[str | None] = "direction reverse"
    single: ClassVar[str | None] = "the split is the step's"

    kind: Literal["atkd"] = "atkd"
    weight: Positive = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    hard_fraction: Fraction = Field(default=0.5, description="k: share of tokens that are hard")
    easy_weight: Fraction = Field(default=0.2, description="lambda; hard tokens get 1 - lambda")

    @property
    def weighs_by_student(self) -> bool:
        """In reverse."""
        return self.direction == "reverse"


class TokenTemperature(LossSection):
    """Token temperatures (arXiv 2510.11615, "AdaKD" to its authors, as another method is): tokens
    at which the student is far from its teacher are compared cold, near ones warm.

    Temperatures lie on `levels` from exp(-strength) to exp(strength), evenly in their logarithm;
    `student_trainer.losses.terms.token_temperature` has the equations. The student reads every row
    once more before it learns.
    """

    reads_ids: ClassVar[bool] = True
    student_weighted: ClassVar[str | None] = "divergence reverse_kl"
    single: ClassVar[str | None] = "the temperatures are the step's"

    kind: Literal["token_temperature"] = "token_temperature"
    weight: Positive = 1.0
    divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    strength: float = Field(default=0.5, gt=0, le=2, description="c: log of the largest")
    levels: int = Field(default=5, ge=3, le=33, description="temperatures; odd, 1 is among them")
    hardest: float = Field(
        default=1.0, gt=0, le=1, description="share of a step's tokens that is learnt"
    )

    @property
    def weighs_by_student(self) -> bool:
        """With the reverse KL."""
        return self.divergence == "reverse_kl"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those of the levels, the coldest first."""
        half = self.levels // 2
        logs = (self.strength * level / half for level in range(-half, half + 1))
        return tuple(round(math.exp(log), 6) for log in logs)

    @model_validator(mode="after")
    def _one_is_a_level(self) -> "TokenTemperature":
        if self.levels % 2 == 0:
            raise ValueError(
                f"the levels of token_temperature are {self.levels}; take an odd number, so that "
                "temperature 1 is one of them"
            )
        return self


class Preference(LossSection):
    """Preference distillation: prefer the chosen response to the rejected one by more than the
    teacher does, which is the reference (LLaVA-MoD, arXiv 2408.15881; DPO, arXiv 2305.18290).

    Rows have `prompt`, `chosen` and `rejected`. With `pairs: written` they are ordinary ones, and
    before training starts the teacher writes the chosen response to each prompt and the student, as
    it begins, the rejected one. Of the teacher the log-probabilities of labels are asked.
    `kto_pair` is KTO (arXiv 2402.01306) on pairs, as in TRL, with the gradient through its KL
    estimates stopped and the estimates those of the whole step; the published code has neither. A
    step's value is the mean over its pairs. The student reads every row once more before it learns,
    without dropout.
    """

    of_pairs: ClassVar[bool] = True
    single: ClassVar[str | None] = "the pairs are the step's"

    kind: Literal["preference"] = "preference"
    weight: Positive = 1.0
    objective: Literal["dpo", "kto_pair"] = "dpo"
    beta: Positive = 0.1
    pairs: Literal["given", "written"] = Field(
        default="given",
        description="given in rows, or written: chosen by the teacher, rejected by the student",
    )


BESIDE_PAIRS = ("hidden_states", "self_features", "router_balance")


def learns_pairs(losses: Sequence[LossSection]) -> bool:
    """Whether a run learns from preferences."""
    return any(loss.of_pairs for loss in losses)


def writes_pairs(losses: Sequence[LossSection]) -> bool:
    """Whether teacher and student write the preferences of a run before it starts."""
    return any(isinstance(loss, Preference) and loss.pairs == "written" for loss in losses)


def reads_pairs(losses: Sequence[LossSection]) -> bool:
    """Whether the rows of a run hold preferences."""
    return learns_pairs(losses) and not writes_pairs(losses)


def teachers_write_texts(config: "Config") -> bool:
    """Whether teachers write texts, in training or before it."""
    return config.source.teacher > 0 or writes_pairs(config.losses)


def check_preference(config: "Config") -> None:
    """Raise ValueError where a run that learns pairs of responses asks for what reads each as a
    text to learn, or would cut one."""
    losses, data = config.losses, config.data
    if not learns_pairs(losses):
        return
    kinds = [str(loss.kind) for loss in losses]
    others = [kind for kind in kinds if kind not in ("preference", *BESIDE_PAIRS)]
    contradictions = {
        f"losses has a {', '.join(others)} too, which would learn the rejected responses; leave "
        "one of the two out": bool(others),
        "source is not the data set alone, and what models write is no pair; leave source out": (
            not config.source.is_dataset
        ),
        "task classifies texts; leave it out": config.task.classifies,
        "a domain's columns have a teacher_prompt, which is of one text; leave it out": any(
            "teacher_prompt" in domain.columns for domain in config.domains.values()
        ),
        "what comes next is decided from losses on validation text, which are over both responses; "
        "take a fixed mixture and progressive.plateau=null": config.decides_from_validation,
        "baseline would train another student on both; set baseline=false": config.baseline,
        "online_modules would learn both; leave them out": config.modules is not None,
        "weighting weighs tokens one by one; leave it out": config.weighting.weighs,
        f"data.too_long is {data.too_long}, and a pair is never cut; set data.too_long=drop or "
        "refuse": data.too_long not in ("drop", "refuse"),
        "data.loss_on is everything, and prompts are not preferred; set data.loss_on=responses": (
            data.loss_on != "responses"
        ),
    }
    for said, found in contradictions.items():
        if found:
            raise ValueError(f"losses has a preference, for pairs of responses, but {said}")
    for said, found in _unwritten(config).items():
        if found and writes_pairs(losses):
            raise ValueError(f"losses has a preference whose pairs are written, but {said}")


def _unwritten(config: "Config") -> dict[str, bool]:
    """What leaves nobody to write pairs, or looks at rows before they are there."""
    across, free = config.cross_tokenizer, config.targets.teacher_free
    return {
        "task is image_text, and models write after text alone; set pairs=given": config.task.sees,
        f"cross_tokenizer is {across}, and the teacher writes in tokens of its own; set "
        "pairs=given": across is not None,
        "teachers has a follow_student, which writes as the student does; leave it out": (
            any(teacher.follow_student is not None for teacher in config.teachers.values())
        ),
        "targets.teacher_free leaves no teacher to write; remove it": free,
        "progressive orders rows before pairs are written; leave it out": (
            config.progressive is not None
        ),
    }

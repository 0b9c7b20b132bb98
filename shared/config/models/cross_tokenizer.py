"""Learning from a teacher of another tokenizer: by which outcomes are compared, and with what."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from shared.config.losses import Divergence, Loss, TotalVariation

if TYPE_CHECKING:
    from shared.config.run import Config

CrossTokenizer = Literal["grouped", "aligned", "uld"]


def check_cross_tokenizer(config: "Config") -> None:
    """Raise ValueError where a run across tokenizers has what needs one tokenizer."""
    method = config.cross_tokenizer
    if method is None:
        return
    for loss in config.losses:
        _check_loss(loss, method)
    for said, way_out in _not_across(config):
        raise ValueError(
            f"cross_tokenizer is {method}, with which the teacher reads tokens of its own, but "
            f"{said}; {way_out}, or leave cross_tokenizer out"
        )


def _check_loss(loss: Loss, method: CrossTokenizer) -> None:
    if not loss.asks_teacher:
        return
    if not isinstance(loss, Divergence):
        raise ValueError(
            f"cross_tokenizer is {method}, but losses has a {loss.kind}, which needs both models "
            "at the same tokens; take a divergence, as forward_kl, or leave cross_tokenizer out"
        )
    if method == "uld" and not isinstance(loss, TotalVariation):
        raise ValueError(
            f"cross_tokenizer is uld, but losses has a {loss.kind}, and ULD is the sum of |p - q| "
            "over ranks, twice total_variation; take {kind: total_variation, weight: 2}, or "
            "cross_tokenizer=grouped"
        )
    if method == "grouped" and loss.temperature != 1:
        raise ValueError(
            f"cross_tokenizer is grouped, but losses has a {loss.kind} with temperature "
            f"{loss.temperature}, at which a group would weigh more the more tokens it has; set "
            "temperature to 1, or cross_tokenizer=aligned"
        )


def _not_across(config: "Config") -> Iterator[tuple[str, str]]:
    """What of a config needs one tokenizer, and the way out."""
    targets, mixture, progressive = config.targets, config.mixture, config.progressive
    if config.task.classifies:
        yield f"task.kind is {config.task.kind}, whose teacher always does", "leave it out"
    if len(config.teachers) > 1:
        yield f"teachers has {len(config.teachers)}", "keep one"
    for name, teacher in config.teachers.items():
        if teacher.online_modules is not None:
            yield f"teachers.{name}.online_modules learn from the student's", "leave them out"
        if teacher.follow_student is not None:
            yield f"teachers.{name}.follow_student is the student", "leave it out"
    if not config.source.is_dataset:
        yield f"source has {config.source.written_in_words}", "set source=dataset"
    if targets.exact is not None:
        yield f"targets.exact is {targets.exact}, over one vocabulary", "leave targets.exact out"
    if targets.student_ids:
        yield f"targets.student_ids is {targets.student_ids}, of the student's", "leave them out"
    if targets.selector not in ("auto", "top_k"):
        yield f"targets.selector is {targets.selector}", "take top_k"
    if config.weighting.weighs:
        yield f"weighting.policy {config.weighting.policy} weighs tokens by both", "leave it out"
    if config.prompts is not None:
        yield f"prompts is {config.prompts}, in the student's", "leave prompts out"
    for name, domain in config.domains.items():
        if "teacher_prompt" in domain.columns:
            yield f"domains.{name}.columns has a teacher_prompt", "leave it out"
    if mixture.policy == "doremi":
        yield "mixture.policy doremi compares them token by token", "take ddk, sheared or fixed"
    if mixture.policy == "odm" and config.cross_tokenizer == "uld":
        yield "mixture.policy odm rewards a KL at the same tokens", "take ddk, sheared or fixed"
    if progressive is not None and progressive.difficulty == "gap":
        yield "progressive.difficulty is gap, per token of both", "take teacher_nll or length"

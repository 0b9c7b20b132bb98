"""Which validation answers a store keeps: over the whole vocabulary within a budget of bytes, else
over the likeliest ids and the tail."""

from dataclasses import replace

from cluster.planning.handshake import validation_question
from cluster.planning.preparation import Prepared
from shared.config.run import Config
from shared.data.row_store import RowStore
from shared.errors import ConfigError
from shared.in_words import in_bytes
from shared.targets.payload import bytes_per_token

GB = 10**9


def validation_bytes(prepared: Prepared) -> int:
    """What the answers to all validation rows of a run take, as its evaluation asks for them."""
    total = 0.0
    for name in prepared.config.teachers:
        part = prepared.taught_by(name)
        question, _ = validation_question(
            part.config, part.facts.shared_vocab, classes=part.facts.classes()
        )
        if question is None:
            continue
        tokens = sum(
            RowStore.open(d.read_by_teacher["validation"]).num_loss_tokens for d in part.domains
        )
        total += tokens * sum(bytes_per_token(question, hidden_width=0).values())
    return round(total)


def exceeds_budget(prepared: Prepared) -> bool:
    """Whether a store does not keep them."""
    config = prepared.config
    if config.targets.exact is not None or config.targets.store is None:
        return False
    return validation_bytes(prepared) > config.evaluation.store_gb * GB


def bucketed(config: Config) -> Config:
    """The same run, its evaluation over the likeliest ids and the tail."""
    evaluation = config.evaluation.model_copy(update={"kl": "bucketed"})
    return config.model_copy(update={"evaluation": evaluation})


def kept_in_store(prepared: Prepared) -> Prepared:
    """What a store is filled for: the run as it is asked for, or within the budget. Raises
    ConfigError where `evaluation.kl` full does not fit."""
    if not exceeds_budget(prepared):
        return prepared
    config = prepared.config
    if config.evaluation.kl == "full":
        raise ConfigError(
            f"evaluation.kl is full: {_too_much(prepared)}; raise evaluation.store_gb, lower "
            "data.validation_rows, or set evaluation.kl=bucketed"
        )
    return replace(prepared, config=bucketed(config))


def budget_note(prepared: Prepared, *, instead: str) -> str | None:
    """A sentence where validation answers do not fit a store, with what happens instead."""
    return f"{_too_much(prepared)}; {instead}" if exceeds_budget(prepared) else None


def _too_much(prepared: Prepared) -> str:
    return (
        f"validation answers over the whole vocabulary would take "
        f"{in_bytes(validation_bytes(prepared))} of targets.store, more than evaluation.store_gb "
        f"{prepared.config.evaluation.store_gb:g}"
    )

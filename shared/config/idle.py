"""Options that need another one to have an effect, where a config sets them without it.

They are refused as a command reads a config; what a run has recorded may have some.
"""

from collections.abc import Iterator

from shared.config.adaptive_losses import teachers_write_texts
from shared.config.run import Config
from shared.errors import ConfigError

WRITING = ("prompt_tokens", "max_new_tokens", "min_new_tokens", "temperature", "top_p")
Idle = tuple[str, tuple[str, ...], str]  # a section, options of it, and why they have no effect


def refuse_idle(config: Config) -> None:
    """Raise ConfigError for an option that differs from its default and has no effect; not where
    there are stages, any of which may set what it needs."""
    if config.stages:
        return
    for section, options, why in _idle(config):
        found = getattr(config, section)
        for option in options:
            value = getattr(found, option)
            if value != type(found).model_fields[option].default:
                raise ConfigError(f"{section}.{option} is {value}, but {why}, or leave it out")


def _idle(config: Config) -> Iterator[Idle]:
    """What is known to have no effect in a run."""
    targets = config.targets
    if config.source.is_dataset and not teachers_write_texts(config):
        why = "no model writes any text; give student or teacher a share of source"
        yield "source", (*WRITING, "batch_rows"), why
    if targets.store is None:
        why = "targets.store, which keeps answers, is not set; set it"
        yield "evaluation", ("store_gb",), why
        yield "targets", ("store_ids",), why
    if targets.selector in ("top_k", "renormalised"):
        why = f"targets.selector is {targets.selector}, which draws no ids; take another"
        yield "targets", ("draws", "seed"), why
    if config.optimiser.schedule == "constant":
        why = "optimiser.schedule is constant, which never falls; take another"
        yield "optimiser", ("final_lr_fraction",), why

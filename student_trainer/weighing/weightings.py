"""The weighting of a run: by its policy, and how it follows a step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.config.run import Config
from shared.config.weighting import LLKD, InstanceWeights
from shared.config.weighting import Weighting as Section
from shared.errors import WeightingError
from student_trainer.weighing.instance_weights import AnnealedWeights
from student_trainer.weighing.llkd import BY_CLASS, LLKDWeighting
from student_trainer.weighing.reinforced import Selection
from student_trainer.weighing.weighting import REPORTED, StepMeans, Weighting

# What weighs, by policy.
POLICIES: dict[str, Any] = {
    "instance_weights": AnnealedWeights,
    "llkd": LLKDWeighting,
    "reinforced": Selection,
}


def weighting_of(
    config: Config, *, num_domains: int, scored_centre: float | None = None
) -> Weighting | None:
    """The weighting of a run before its first step; None where every position counts alike.

    `scored_centre` is the statistic of the teacher's NLL, nats per token, that the section asks
    for.
    """
    section = config.weighting
    if not section.weighs:
        return None
    options: dict[str, Any] = {}
    if isinstance(section, InstanceWeights):
        options = {"steps": config.steps, "scored_centre": scored_centre}
    if isinstance(section, LLKD):
        options = {"num_classes": len(weighed_classes(config))}
    return POLICIES[section.policy](section, num_domains=num_domains, **options)


def reports_of_weighting(section: Section) -> tuple[str, ...]:
    """Names of what is reported of a weighting by domain."""
    return (*REPORTED, *POLICIES[section.policy].reported) if section.weighs else ()


def weighed_classes(config: Config) -> Sequence[str]:
    """The classes by which a weighting tells rows apart; none where it does not."""
    section = config.weighting
    by_class = isinstance(section, LLKD) and section.by in ("auto", "class")
    return config.task.classes if by_class else ()


def policy_sums_of(config: Config) -> int:
    """How many numbers beside those by domain a policy sums up over a step."""
    if config.weighting.selects:
        return Selection.num_policy_sums
    return len(BY_CLASS) * len(weighed_classes(config))


def follow_step(
    weighting: Weighting,
    sums: Mapping[str, np.ndarray],
    tokens_D: np.ndarray,
    *,
    step: int,
    policy_F: np.ndarray,
) -> None:
    """Let a weighting follow step `step`, counted from 0, before any weight changes.

    `sums` are those of all ranks by the names of `reports_of_weighting`, [D], `policy_F` its
    further sums. Raises WeightingError on every rank where no token is left to learn from.
    """
    num_tokens = int(tokens_D.sum())
    if not num_tokens:
        return
    if not sums["selected_share"].sum():
        raise WeightingError(
            f"weighting leaves none of the {num_tokens:,} tokens of step {step + 1} to learn from; "
            f"{weighting.way_out}, or raise batch.rows_per_step, and start over with --fresh, "
            "which moves this run aside"
        )
    weighting.follow(StepMeans(sums, tokens_D, step + 1, policy_F))

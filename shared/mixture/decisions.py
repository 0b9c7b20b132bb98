"""Decisions: at which steps they are made, which blocks they settle, and what one holds."""

import sys
from collections.abc import Sequence

import numpy as np

from shared.config.run import Config
from shared.mixture.ddk import perplexity_ratios
from shared.mixture.domain_policies import validation_gaps
from shared.mixture.phases import next_phase
from shared.mixture.weight_log import DomainReport, WeightEntry


def decision_index(config: Config, step: int) -> int:
    """Index of the last entry decided at or before `step`."""
    return 0 if config.decision_interval is None else step // config.decision_interval


def known_through(config: Config, steps_done: int) -> int:
    """The last block whose weights are settled once every decision up to `steps_done` is known."""
    if config.decision_interval is None:
        return sys.maxsize
    next_decision = (decision_index(config, steps_done) + 1) * config.decision_interval
    return next_decision + config.mixture.lag_steps - 1


def first_entry(
    weights: tuple[float, ...],
    *,
    factors: tuple[float, ...] | None,
    report: DomainReport | None,
    domains: Sequence[str],
) -> WeightEntry:
    """The entry that rules from block 0 on; a run never stops before its first step."""
    gap = None if report is None else mean_gap(report, domains=domains)
    return WeightEntry(0, decided_at=0, effective_from=0, weights=weights, factors=factors, gap=gap)


def next_entry(
    config: Config,
    before: Sequence[WeightEntry],
    report: DomainReport,
    *,
    weights: tuple[float, ...],
    factors: tuple[float, ...] | None,
) -> WeightEntry:
    """The entry decided from a report after the entries before: a pure function of these."""
    domains = tuple(config.domains)
    gap = mean_gap(report, domains=domains)
    effective_from = report.step + config.mixture.lag_steps
    phase = 0
    if config.progressive is not None:
        phase = next_phase(
            before,
            config.progressive,
            decided_at=report.step,
            effective_from=effective_from,
            gap=gap,
        )
    return WeightEntry(
        index=len(before),
        decided_at=report.step,
        effective_from=effective_from,
        weights=weights,
        factors=factors,
        phase=phase,
        gap=gap,
        stop=has_caught_up(report, ratio=config.stop_ratio, domains=domains),
    )


def mean_gap(report: DomainReport, *, domains: Sequence[str]) -> float | None:
    """How far the student is behind the teacher on validation text, nats per token: the mean over
    the domains that have some. None where it was not looked at. Raises NonFiniteLossError."""
    counted_D = np.array(report.num_tokens) > 0
    if not counted_D.any():
        return None
    return float(validation_gaps(report, domains=domains)[counted_D].mean())


def has_caught_up(report: DomainReport, *, ratio: float | None, domains: Sequence[str]) -> bool:
    """Whether the student's perplexity is at most `ratio` times the teacher's in every domain:
    the stop on small discrepancy of DDK (arXiv 2407.16154, Algorithm 1)."""
    if ratio is None:
        return False
    return bool(perplexity_ratios(report, domains=domains).max() <= ratio)

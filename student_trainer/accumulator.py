"""What a run measures between two lines of `metrics.jsonl`, and the line itself.

D domains in config order   L losses in config order   Q quantities of `BY_DOMAIN`
"""

import time
from dataclasses import dataclass

import numpy as np

from shared.config.run import Config
from shared.mixture.weight_log import WeightEntry
from shared.run.metrics import DomainMetrics, StepMetrics
from shared.targets.reader import ReaderStats
from student_trainer.losses.token_losses import term_names
from student_trainer.objective import BY_DOMAIN, TOTALS
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step

MACHINE = 6  # seconds, teacher wait, units, wire bytes, retried units, cache hits


@dataclass(slots=True)
class Interval:
    """Sums over the steps since the last line.

    `sums` and the counts cover all ranks, `machine` is this rank's. All are kept in checkpoints,
    so that a line after a resume covers the same steps as the uninterrupted run's.
    """

    sums: np.ndarray  # `TOTALS`, L terms, Q by D; nats
    tokens_D: np.ndarray
    rows_D: np.ndarray
    machine: np.ndarray

    @staticmethod
    def empty(num_losses: int, num_domains: int) -> "Interval":
        """Nothing measured yet."""
        tokens_D, rows_D = np.zeros((2, num_domains), np.int64)
        sums = np.zeros(len(TOTALS) + num_losses + len(BY_DOMAIN) * num_domains)
        return Interval(sums, tokens_D, rows_D, np.zeros(MACHINE))

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of `BY_DOMAIN`, float64 [D]."""
        num_domains = len(self.tokens_D)
        sums_QD = self.sums[-len(BY_DOMAIN) * num_domains :].reshape(len(BY_DOMAIN), num_domains)
        return sums_QD[BY_DOMAIN.index(quantity)]

    def add(self, step: Step, sums: np.ndarray, machine: np.ndarray) -> None:
        """Count one step in."""
        self.sums += sums
        self.tokens_D += step.domain_tokens_D
        self.rows_D += step.domain_rows_D
        self.machine += machine

    def state(self, ranks: Ranks) -> dict[str, list]:
        """What a checkpoint keeps; floats survive JSON exactly. All ranks call it together."""
        kept = {name: getattr(self, name).tolist() for name in ("sums", "tokens_D", "rows_D")}
        return kept | {"machine": ranks.sum(self.machine).tolist()}

    @staticmethod
    def from_state(state: dict[str, list], ranks: Ranks) -> "Interval":
        """The inverse of `state`; what all ranks' machines did is rank 0's from here on."""
        tokens_D, rows_D = (np.array(state[name], np.int64) for name in ("tokens_D", "rows_D"))
        machine = np.array(state["machine"]) if ranks.leads else np.zeros(MACHINE)
        return Interval(np.array(state["sums"], np.float64), tokens_D, rows_D, machine)


@dataclass(slots=True)
class SinceReport:
    """Training sums of all ranks since the last report to the controller, kept in checkpoints."""

    sums: np.ndarray  # Q by D, nats
    tokens_D: np.ndarray

    @staticmethod
    def empty(num_domains: int) -> "SinceReport":
        """Nothing learnt yet."""
        return SinceReport(np.zeros((len(BY_DOMAIN), num_domains)), np.zeros(num_domains, np.int64))

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of `BY_DOMAIN`, float64 [D]."""
        return self.sums[BY_DOMAIN.index(quantity)]

    def add(self, step: Step, sums: np.ndarray) -> None:
        """Count one step in; `sums` as `Objective` orders them."""
        self.sums += sums[-self.sums.size :].reshape(self.sums.shape)
        self.tokens_D += step.domain_tokens_D

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps; floats survive JSON exactly."""
        return {"sums": self.sums.tolist(), "tokens_D": self.tokens_D.tolist()}

    @staticmethod
    def from_state(state: dict[str, list]) -> "SinceReport":
        """The inverse of `state`."""
        return SinceReport(
            np.array(state["sums"], np.float64), np.array(state["tokens_D"], np.int64)
        )


class Stopwatch:
    """Seconds and reader counters since it was made."""

    def __init__(self, stats: ReaderStats | None) -> None:
        self._start, self._stats = time.perf_counter(), stats
        self._before = _counters(stats)

    def machine(self) -> np.ndarray:
        """In the order of `Interval.machine`."""
        seconds = time.perf_counter() - self._start
        return np.concatenate([[seconds], _counters(self._stats) - self._before])


def metrics_line(
    interval: Interval,
    config: Config,
    *,
    step: int,
    lr: float,
    grad_norm: float,
    entry: WeightEntry,
    epochs: tuple[float, ...],
    teacher_share: float,
    machine: np.ndarray,
) -> StepMetrics:
    """The line of an interval. `entry` was in force at its last step, `epochs` are as of then, and
    `machine` is already reduced over ranks."""
    tokens = int(interval.tokens_D.sum())
    means = interval.sums / max(1, tokens)
    totals = dict(zip(TOTALS, means.tolist(), strict=False))
    names = term_names(config.losses)
    domains = {
        name: DomainMetrics(
            tokens=int(interval.tokens_D[d]),
            sequences=int(interval.rows_D[d]),
            weight=entry.weights[d],
            epochs=epochs[d],
            **_token_means(interval, config, d),
        )
        for d, name in enumerate(config.domains)
    }
    seconds, wait_s, units, wire_bytes, retried, hits = machine.tolist()
    return StepMetrics(
        step=step,
        loss=totals["loss"],
        lr=lr,
        grad_norm=grad_norm,
        tokens=tokens,
        captured_mass=totals["captured_mass"] if config.needs_teacher else None,
        unseen_mass=totals["unseen_mass"] if config.needs_teacher else None,
        teacher_share=teacher_share if config.taid else None,
        terms=dict(zip(names, means[len(TOTALS) :].tolist(), strict=False)),
        domains=domains,
        phase=entry.phase if config.progressive else None,
        seconds=seconds,
        teacher_wait_s=wait_s,
        units=round(units),
        wire_bytes=round(wire_bytes),
        retried_units=round(retried),
        cache_hits=round(hits),
    )


def progress_line(line: StepMetrics, config: Config, *, steps_in_line: int) -> str:
    """One human line, readable in a job's log."""
    parts = [f"step {line.step}/{config.steps}", f"loss {line.loss:.3f}"]
    if config.progressive and line.phase is not None:
        parts.insert(1, f"phase {line.phase + 1}/{config.progressive.phases}")
    kls = [f"{name} {_short(d.kl)}" for name, d in line.domains.items() if d.kl is not None]
    if kls:
        parts.append("kl " + " ".join(kls))
    parts.append("mix " + " ".join(_short(d.weight) for d in line.domains.values()))
    parts.append(f"{_thousands(line.tokens_per_s)} tok/s")
    if line.units or line.teacher_wait_s:
        parts.append(f"teacher wait {line.teacher_wait_s / max(line.seconds, 1e-9):.0%}")
    left_s = (config.steps - line.step) * line.seconds / max(1, steps_in_line)
    parts.append(f"eta {_duration(left_s)}")
    return " | ".join(parts)


def _token_means(interval: Interval, config: Config, d: int) -> dict[str, float | None]:
    """What `DomainMetrics` has per loss token of domain `d`; None where it was not measured."""
    count = interval.tokens_D[d]

    def mean(quantity: str, measured: bool) -> float | None:
        return float(interval.by_domain(quantity)[d] / count) if measured and count else None

    adaptive = config.atkd is not None
    return {
        "kl": mean("kl", config.needs_teacher),
        "hard_share": mean("hard", adaptive),
        "uncertainty": mean("uncertainty", adaptive),
        "tkd": mean("tkd", adaptive),
        "dkd": mean("dkd", adaptive),
    }


def _counters(stats: ReaderStats | None) -> np.ndarray:
    if stats is None:
        return np.zeros(MACHINE - 1)
    counts = (stats.units, stats.wire_bytes, stats.retried_units, stats.cache_hits)
    return np.array([stats.wait_s, *counts], np.float64)


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

"""What a run measures while it trains: sums over steps, kept in checkpoints, and a stopwatch.

D domains in config order   Q quantities of `BY_DOMAIN`
"""

import time

import numpy as np

from shared.targets.reader import ReaderStats
from student_trainer.objective import BY_DOMAIN, TOTALS
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step

MACHINE = 6  # seconds, teacher wait, units, wire bytes, retried units, cache hits


class MetricsAccumulator:
    """Sums over the steps since the last line of metrics; satisfies `Stateful`.

    `sums` (nats: `TOTALS`, each loss, Q by D) and the counts `tokens_D` and `rows_D` cover all
    ranks, `machine` is this rank's. All are kept in checkpoints, so that a line after a resume
    covers the same steps as the uninterrupted run's.
    """

    def __init__(self, ranks: Ranks, *, num_losses: int, num_domains: int) -> None:
        self._ranks = ranks
        self._num_sums = len(TOTALS) + num_losses + len(BY_DOMAIN) * num_domains
        self._num_domains = num_domains
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self.tokens_D, self.rows_D = np.zeros((2, self._num_domains), np.int64)
        self.sums, self.machine = np.zeros(self._num_sums), np.zeros(MACHINE)

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of `BY_DOMAIN`, float64 [D]."""
        sums_QD = self.sums[-len(BY_DOMAIN) * self._num_domains :].reshape(-1, self._num_domains)
        return sums_QD[BY_DOMAIN.index(quantity)]

    def add(self, step: Step, sums: np.ndarray, machine: np.ndarray) -> None:
        """Count one step in."""
        self.sums += sums
        self.tokens_D += step.domain_tokens_D
        self.rows_D += step.domain_rows_D
        self.machine += machine

    def state(self) -> dict[str, list]:
        """See `Stateful`."""
        kept = {name: getattr(self, name).tolist() for name in ("sums", "tokens_D", "rows_D")}
        return kept | {"machine": self._ranks.sum(self.machine).tolist()}

    def restore(self, state: dict[str, list]) -> None:
        """See `Stateful`; what all ranks' machines did is rank 0's from here on."""
        self.sums = np.array(state["sums"], np.float64)
        self.tokens_D = np.array(state["tokens_D"], np.int64)
        self.rows_D = np.array(state["rows_D"], np.int64)
        self.machine = np.array(state["machine"]) if self._ranks.leads else np.zeros(MACHINE)


class ReportAccumulator:
    """Training sums of all ranks since the last report to the controller; satisfies `Stateful`.

    `sums` are nats [Q, D], `tokens_D` the loss tokens they cover.
    """

    def __init__(self, *, num_domains: int) -> None:
        self._num_domains = num_domains
        self.clear()

    def clear(self) -> None:
        """Begin the next report."""
        self.sums = np.zeros((len(BY_DOMAIN), self._num_domains))
        self.tokens_D = np.zeros(self._num_domains, np.int64)

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of `BY_DOMAIN`, float64 [D]."""
        return self.sums[BY_DOMAIN.index(quantity)]

    def add(self, step: Step, sums: np.ndarray) -> None:
        """Count one step in; `sums` as `Objective` orders them."""
        self.sums += sums[-self.sums.size :].reshape(self.sums.shape)
        self.tokens_D += step.domain_tokens_D

    def state(self) -> dict[str, list]:
        """See `Stateful`."""
        return {"sums": self.sums.tolist(), "tokens_D": self.tokens_D.tolist()}

    def restore(self, state: dict[str, list]) -> None:
        """See `Stateful`."""
        self.sums = np.array(state["sums"], np.float64)
        self.tokens_D = np.array(state["tokens_D"], np.int64)


class Stopwatch:
    """Seconds and reader counters since it was made."""

    def __init__(self, stats: ReaderStats | None) -> None:
        self._start, self._stats = time.perf_counter(), stats
        self._before = _counters(stats)

    def machine(self) -> np.ndarray:
        """In the order of `MetricsAccumulator.machine`."""
        seconds = time.perf_counter() - self._start
        return np.concatenate([[seconds], _counters(self._stats) - self._before])


def _counters(stats: ReaderStats | None) -> np.ndarray:
    if stats is None:
        return np.zeros(MACHINE - 1)
    counts = (stats.units, stats.wire_bytes, stats.retried_units, stats.cache_hits)
    return np.array([stats.wait_s, *counts], np.float64)

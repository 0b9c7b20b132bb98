"""What a run measures while it trains: sums over steps, kept in checkpoints, and a stopwatch.

D domains in config order   Q quantities of `BY_DOMAIN`
"""

import time

import numpy as np

from shared.targets.reader import ReaderStats
from shared.targets.routing import RunReader
from student_trainer.objective import BY_DOMAIN, TOTALS
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step

COUNTERS = 5  # of a reader: teacher wait, units, wire bytes, retried units, cache hits


class MetricsAccumulator:
    """Sums over the steps since the last line of metrics; satisfies `Stateful`.

    `sums` (nats: `TOTALS`, each loss, Q by D) and the counts `tokens_D` and `rows_D` cover all
    ranks, `machine` is this rank's: seconds, the reader's `COUNTERS`, and those of each of several
    teachers. All are kept in checkpoints, so that a line after a resume
    covers the same steps as the uninterrupted run's.
    """

    def __init__(
        self, ranks: Ranks, *, num_losses: int, num_domains: int, num_teachers: int = 0
    ) -> None:
        self._num_machine = 1 + COUNTERS * (1 + num_teachers)
        self._ranks = ranks
        self._num_sums = len(TOTALS) + num_losses + len(BY_DOMAIN) * num_domains
        self._num_domains = num_domains
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self.tokens_D, self.rows_D = np.zeros((2, self._num_domains), np.int64)
        self.sums, self.machine = np.zeros(self._num_sums), np.zeros(self._num_machine)

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
        machine = np.array(state["machine"], np.float64)
        self.machine = machine if self._ranks.leads else np.zeros(self._num_machine)


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

    def __init__(self, reader: RunReader | None) -> None:
        self._start, self._reader = time.perf_counter(), reader
        self._before = self._counters()

    def machine(self) -> np.ndarray:
        """In the order of `MetricsAccumulator.machine`."""
        seconds = time.perf_counter() - self._start
        return np.concatenate([[seconds], self._counters() - self._before])

    def _counters(self) -> np.ndarray:
        return np.zeros(COUNTERS) if self._reader is None else _counters(self._reader.stats)


def _counters(stats: ReaderStats) -> np.ndarray:
    """Those of all teachers, then of each in config order where there are several."""
    counts = (stats.units, stats.wire_bytes, stats.retried_units, stats.cache_hits)
    own = np.array([stats.wait_s, *counts], np.float64)
    return np.concatenate([own, *(_counters(each) for each in stats.teachers.values())])

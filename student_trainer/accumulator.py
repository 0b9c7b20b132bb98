"""What a run measures while it trains: sums over steps, kept in checkpoints, and a stopwatch.

D domains in config order
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from shared.targets.reader import ReaderStats
from shared.targets.routing import RunReader
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step
from student_trainer.sums import BY_DOMAIN, LISTED, SumLayout

COUNTERS = 5  # of a reader: teacher wait, units, wire bytes, retried units, cache hits
WRITTEN = ("rollouts", "ended", "unanswered", "lag")  # counts of a `RolloutAccumulator`
PARTS = ("compute", "optimiser")  # of a step that are timed, without waiting for the teacher


class MetricsAccumulator:
    """Sums over the steps since the last line of metrics; satisfies `Stateful`.

    `sums` (as `layout` has them) and the counts `tokens_D` and `rows_D` cover all ranks, `machine`
    is this rank's: seconds, the reader's `COUNTERS`, those of each of several teachers, and the
    seconds of `PARTS`. All are kept in checkpoints, so that a line after a resume covers the same
    steps as the uninterrupted run's.
    """

    def __init__(self, ranks: Ranks, layout: SumLayout, *, num_teachers: int = 0) -> None:
        self._ranks, self.layout = ranks, layout
        self._num_machine = 1 + COUNTERS * (1 + num_teachers) + len(PARTS)
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self.tokens_D, self.rows_D = np.zeros((2, self.layout.num_domains), np.int64)
        self.sums, self.machine = np.zeros(self.layout.size), np.zeros(self._num_machine)

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of the layout's quantities by domain, float64 [D]."""
        return self.sums[self.layout.place(quantity)]

    def add(self, step: Step, sums: np.ndarray, machine: np.ndarray) -> None:
        """Count one step in."""
        self.sums += sums
        self.tokens_D += step.domain_tokens_D
        self.rows_D += step.domain_rows_D
        self.machine += machine

    def state(self) -> dict[str, Any]:
        """See `Stateful`; sums by their names."""
        kept = {name: getattr(self, name).tolist() for name in ("tokens_D", "rows_D")}
        machine = self._ranks.sum(self.machine).tolist()
        return kept | {"sums": self.layout.state(self.sums), "machine": machine}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`; what all ranks' machines did is rank 0's from here on. Parts that were
        not timed are 0."""
        self.sums = self.layout.from_state(state["sums"])
        self.tokens_D = np.array(state["tokens_D"], np.int64)
        self.rows_D = np.array(state["rows_D"], np.int64)
        machine = np.zeros(self._num_machine)
        machine[: len(state["machine"])] = state["machine"]
        self.machine = machine if self._ranks.leads else np.zeros(self._num_machine)


class ReportAccumulator:
    """Training sums of all ranks since the last report to the controller; satisfies `Stateful`.

    `sums` are nats [D] by the names of `BY_DOMAIN`, `tokens_D` the loss tokens they cover.
    """

    def __init__(self, layout: SumLayout) -> None:
        self._layout = layout
        self.clear()

    def clear(self) -> None:
        """Begin the next report."""
        size = self._layout.num_domains
        self.sums = {name: np.zeros(size) for name in BY_DOMAIN}
        self.tokens_D = np.zeros(size, np.int64)

    def by_domain(self, quantity: str) -> np.ndarray:
        """Sums of one of `BY_DOMAIN`, float64 [D]."""
        return self.sums[quantity]

    def add(self, step: Step, sums: np.ndarray) -> None:
        """Count one step in; `sums` as the layout has them."""
        for name in BY_DOMAIN:
            self.sums[name] += sums[self._layout.place(name)]
        self.tokens_D += step.domain_tokens_D

    def state(self) -> dict[str, Any]:
        """See `Stateful`; sums by their names."""
        sums = {name: sums_D.tolist() for name, sums_D in self.sums.items()}
        return {"sums": sums, "tokens_D": self.tokens_D.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`; a list of sums has the order of `LISTED`."""
        found = state["sums"]
        named = dict(zip(LISTED, found, strict=True)) if isinstance(found, list) else found
        self.sums = {name: np.array(named[name], np.float64) for name in BY_DOMAIN}
        self.tokens_D = np.array(state["tokens_D"], np.int64)


class RolloutAccumulator:
    """Counts of what the student wrote over the steps since the last line; satisfies `Stateful`.

    `ends` are ids that end what it writes. `counts` are those of this rank, by the names of
    `WRITTEN`: rollouts, how many of them ended by themselves, rows whose prompt left no room, and
    the sum over rollouts of the steps since their weights. `effort` is what this rank did since
    then, for whatever step: seconds that it wrote, and the tokens.
    """

    def __init__(self, ranks: Ranks, ends: tuple[int, ...]) -> None:
        self._ranks, self._ends = ranks, ends
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self.counts, self.effort = np.zeros(len(WRITTEN)), np.zeros(2)

    def add(self, step: Step, *, effort: np.ndarray) -> None:
        """Count one step's units in, and what this rank did meanwhile."""
        self.effort += effort
        for rows in step.units:
            version_R = rows.versions()
            if version_R is None:
                continue
            columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
            for version, ids, starts, mask in zip(version_R.tolist(), *columns, strict=True):
                if version < 0:
                    continue
                lasts = ids[np.append(starts[1:], len(ids)) - 1]
                number = len(starts) if mask.any() else 0
                ended = int(np.isin(lasts, self._ends).sum()) if number else 0
                self.counts += (number, ended, not number, number * (step.index - version))

    def total(self) -> dict[str, float]:
        """The counts of all ranks, `seconds` in the mean over them and the `tokens` of all; all
        ranks together."""
        *found, seconds, tokens = self._ranks.sum(np.append(self.counts, self.effort)).tolist()
        effort = {"seconds": seconds / self._ranks.world_size, "tokens": tokens}
        return dict(zip(WRITTEN, found, strict=True)) | effort

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {
            name: self._ranks.sum(getattr(self, name)).tolist() for name in ("counts", "effort")
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`; what all ranks did is rank 0's from here on."""
        self.clear()
        if self._ranks.leads:
            self.counts = np.array(state["counts"], np.float64)
            self.effort = np.array(state["effort"], np.float64)


class Stopwatch:
    """Seconds, reader counters and the seconds of `PARTS` since it was made."""

    def __init__(self, reader: RunReader | None) -> None:
        self._start, self._reader = time.perf_counter(), reader
        self._before = self._counters()
        self._parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def timed(self, part: Literal["compute", "optimiser"]) -> Iterator[None]:
        """Count the time of a `with` in, less what of it waits for the teacher."""
        start, waited_s = time.perf_counter(), self._counters()[0]
        yield
        self._parts[part] += time.perf_counter() - start - (self._counters()[0] - waited_s)

    def machine(self) -> np.ndarray:
        """In the order of `MetricsAccumulator.machine`."""
        seconds = time.perf_counter() - self._start
        return np.concatenate([[seconds], self._counters() - self._before, [*self._parts.values()]])

    def _counters(self) -> np.ndarray:
        return np.zeros(COUNTERS) if self._reader is None else _counters(self._reader.stats)


def _counters(stats: ReaderStats) -> np.ndarray:
    """Those of all teachers, then of each in config order where there are several."""
    counts = (stats.units, stats.wire_bytes, stats.retried_units, stats.cache_hits)
    own = np.array([stats.wait_s, *counts], np.float64)
    return np.concatenate([own, *(_counters(each) for each in stats.teachers.values())])

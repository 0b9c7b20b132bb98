"""What a run measures while it trains: sums over steps, kept in checkpoints, and a stopwatch.

D domains in config order
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from shared.data.rollouts import DATA_SET, TEACHER
from shared.targets.reader import ReaderStats
from shared.targets.routing import RunReader
from student_trainer.metrics.sums import BY_DOMAIN, LISTED, SumLayout
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step
from student_trainer.sources.source import EFFORT

COUNTERS = 5  # of a reader: teacher wait, units, wire bytes, retried units, cache hits
# Counts of a `RolloutAccumulator`: of the student's texts, then of the teacher's.
WRITTEN = ("rollouts", "ended", "unanswered", "lag", "empty")
TEXTS = ("texts", "texts_ended", "texts_unanswered", "texts_empty", "texts_tokens")
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
    """Counts of what student and teacher wrote over the steps since the last line; satisfies
    `Stateful`.

    `ends` are ids that end what they write. `counts` are those of this rank, by the names of
    `WRITTEN` and `TEXTS`: texts, how many of them ended by themselves, rows whose prompt left no
    room, the sum over the student's of the steps since their weights, texts that ended at once, and
    tokens. `effort` is what this rank did since then, for whatever step, by the names of `EFFORT`.
    """

    def __init__(self, ranks: Ranks, ends: tuple[int, ...]) -> None:
        self._ranks, self._ends = ranks, ends
        self.clear()

    def clear(self) -> None:
        """Begin the next line."""
        self.counts, self.effort = np.zeros(len(WRITTEN + TEXTS)), np.zeros(len(EFFORT))

    def add(self, step: Step, *, effort: np.ndarray) -> None:
        """Count one step's units in, and what this rank did meanwhile."""
        self.effort += effort
        for rows in step.units:
            version_R = rows.versions()
            if version_R is None:
                continue
            columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
            for version, ids, starts, mask in zip(version_R.tolist(), *columns, strict=True):
                if version == DATA_SET:
                    continue
                lengths = np.add.reduceat(mask, starts, dtype=np.int64) if mask.any() else []
                number = len(lengths)
                is_end = np.isin(ids[np.append(starts[1:], len(ids)) - 1], self._ends)[:number]
                empty = int((is_end & (np.array(lengths) == 1)).sum())
                found = (number, int(is_end.sum()), not number)
                if version == TEACHER:
                    self.counts[len(WRITTEN) :] += (*found, empty, mask.sum())
                else:
                    lag = number * (step.index - version)
                    self.counts[: len(WRITTEN)] += (*found, lag, empty)

    def total(self) -> dict[str, float]:
        """The counts of all ranks, and of `EFFORT` the seconds in the mean over them and the tokens
        of all; all ranks together."""
        found = self._ranks.sum(np.append(self.counts, self.effort)).tolist()
        names: list[str] = [*WRITTEN, *TEXTS, *EFFORT]
        named = dict(zip(names, found, strict=True))
        for name in EFFORT:
            if name.endswith("_s"):
                named[name] /= self._ranks.world_size
        return named

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {
            name: self._ranks.sum(getattr(self, name)).tolist() for name in ("counts", "effort")
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`; what all ranks did is rank 0's from here on. What was not counted is
        0."""
        self.clear()
        if self._ranks.leads:
            for name in ("counts", "effort"):
                getattr(self, name)[: len(state[name])] = state[name]


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

"""Exporter: keeps the metrics of a process alive in an export that forgets them.

Ray drops a gauge that is not set for two of its export intervals, so that one small thread sets all
of them again and again, in long steps and in waits too. The library of instruments is handed in:
nothing here knows of Ray, and without a library nothing is exported, as under plain torchrun.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from shared.run.exported import Metric

EVERY_S = 1.0  # between two times that gauges are set; Ray asks for 5 at most


class Library(Protocol):
    """Makers of instruments, as `ray.util.metrics` has them: `Gauge` with `set(value, tags)`,
    `Counter` with `inc(value, tags)`."""

    Gauge: Any
    Counter: Any


_Series = tuple[Metric, tuple[tuple[str, str], ...]]


class Exporter:
    """What a process exports; for use from any thread. `labels` are those of all its metrics.

    Without a library it exports nothing.
    """

    def __init__(self, library: Library | None = None, **labels: str) -> None:
        self._library, self._labels = library, labels
        self._instruments: dict[str, Any] = {}
        self._values: dict[_Series, float] = {}
        self._samplers: list[Callable[[], None]] = []
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_setting, daemon=True)
        if library is not None:
            self._thread.start()

    def set(self, metric: Metric, value: float | None, **labels: str) -> None:
        """Set a gauge, from now on until it has another value. None: what it told of is gone; a
        gauge that has a value is set to 0, once."""
        if self._library is None:
            return
        with self._lock:
            series = self._series(metric, labels)
            if value is not None:
                self._values[series] = value
                self._put(series, value)
            elif self._values.pop(series, None) is not None:
                self._put(series, 0.0)

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """Let a counter grow."""
        if self._library is not None and amount > 0:
            _, own = self._series(metric, labels)
            self._instrument(metric).inc(float(amount), tags=dict(own))

    def sample(self, sampler: Callable[[], None]) -> None:
        """Call a function, which sets gauges, each time before all are set again."""
        with self._lock:
            self._samplers.append(sampler)

    def leave(self, sampler: Callable[[], None]) -> None:
        """Call it no longer."""
        with self._lock, suppress(ValueError):
            self._samplers.remove(sampler)

    def refresh(self) -> None:
        """Set all gauges again."""
        for sampler in list(self._samplers):
            sampler()
        with self._lock:
            for series, value in self._values.items():
                self._put(series, value)

    def close(self) -> None:
        """Set nothing any more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_setting(self) -> None:
        while not self._closing.wait(EVERY_S):
            self.refresh()

    def _series(self, metric: Metric, labels: Mapping[str, str]) -> _Series:
        known = {**self._labels, **labels}
        return metric, tuple((label, known[label]) for label in metric.labels)

    def _put(self, series: _Series, value: float) -> None:
        metric, own = series
        self._instrument(metric).set(float(value), tags=dict(own))

    def _instrument(self, metric: Metric) -> Any:
        if metric.name not in self._instruments:
            assert self._library is not None, "who sets has looked"
            make = self._library.Gauge if metric.kind == "gauge" else self._library.Counter
            self._instruments[metric.name] = make(
                metric.name, description=metric.description, tag_keys=metric.labels
            )
        return self._instruments[metric.name]


_current = Exporter()


def start(library: Library, **labels: str) -> Exporter:
    """Let this process export; what it exported before ends. `labels` are those of all it sets."""
    global _current
    stop()
    _current = Exporter(library, **labels)
    return _current


def stop() -> None:
    """End the export of this process."""
    global _current
    _current.close()
    _current = Exporter()


def current() -> Exporter:
    """The exporter of this process."""
    return _current


@contextmanager
def exporting(library: Library, **labels: str) -> Iterator[None]:
    """Let this process export for the length of a `with`."""
    start(library, **labels)
    try:
        yield
    finally:
        stop()

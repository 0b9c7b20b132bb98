"""Demand: what clients of a teacher service report, and how much they wait over a window of time.

Needs no Ray. Times are those of one clock, in seconds.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Report:
    """What one client says about itself."""

    run: str
    client: str  # one pool of one rank
    wait_s: float  # waited since its first answer came
    queue_age_s: float  # of the oldest unit without an answer
    units: int  # sent and not answered
    most_units: int  # at any time since the report before: the moment of a report says little
    num_bytes: int  # of those, and of answers not taken


class Counter:
    """A count that only grows, remembered over a window; one that falls has begun anew."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, float]] = deque()  # when, count

    def note(self, now: float, count: float) -> None:
        """It was so much."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._window_s:
            self._seen.popleft()

    def rate(self, now: float) -> float:
        """Growth per second within the window that ends now; nothing since it was last noted."""
        start = now - self._window_s
        before = [count for at, count in self._seen if at <= start]
        inside = [count for at, count in self._seen if at > start]
        if not inside:
            return 0.0
        first = before[-1] if before else inside[0]
        return (inside[-1] - first) / self._window_s


class Demand:
    """The clients of one service, over the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._waits: dict[str, Counter] = {}
        self._reports: dict[str, deque[tuple[float, Report]]] = {}
        self._work: dict[str, Counter] = {}

    def report(self, report: Report, now: float) -> None:
        """Take what a client says."""
        waits = self._waits.setdefault(report.client, Counter(self._window_s))
        waits.note(now, report.wait_s)
        self._reports.setdefault(report.client, deque()).append((now, report))
        self._forget(now)

    def work(self, seconds: Mapping[str, float], now: float) -> None:
        """Take the seconds that replicas, by process, have computed so far."""
        self._work = {
            process: self._work.get(process, Counter(self._window_s)) for process in seconds
        }
        for process, count in seconds.items():
            self._work[process].note(now, count)

    def waiting(self, now: float) -> float:
        """Share of their time that steps waited: a run's mean over its clients, the largest."""
        self._forget(now)
        by_run: dict[str, list[float]] = {}
        for client, seen in self._reports.items():
            share = min(1.0, max(0.0, self._waits[client].rate(now)))
            by_run.setdefault(seen[-1][1].run, []).append(share)
        return max(map(fmean, by_run.values()), default=0.0)

    def busy(self, now: float) -> float:
        """Share of their time that replicas computed, mean."""
        shares = [min(1.0, max(0.0, work.rate(now))) for work in self._work.values()]
        return fmean(shares) if shares else 0.0

    def units(self, now: float) -> int:
        """Most units under way: the sum of each client's most."""
        self._forget(now)
        return sum(max(one.most_units for _, one in seen) for seen in self._reports.values())

    def reports(self, now: float) -> list[Report]:
        """The last report of every client that has been heard within the window."""
        self._forget(now)
        return [seen[-1][1] for _, seen in sorted(self._reports.items())]

    def _forget(self, now: float) -> None:
        start = now - self._window_s
        for client, seen in list(self._reports.items()):
            while seen and seen[0][0] < start:
                seen.popleft()
            if not seen:
                del self._reports[client], self._waits[client]

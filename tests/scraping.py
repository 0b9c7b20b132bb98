"""Scrapes of a Ray node's export, read by the parser of Prometheus' own client."""

import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from shared.run.exported import LABELS, Metric

EVERY_S = 1.0
Series = tuple[str, tuple[tuple[str, str], ...]]  # exported name, own labels


class Scrapes:
    """Values that were seen, in their order and without repetition, by series."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.helps: dict[str, str] = {}
        self._seen: dict[Series, list[float]] = {}
        self._live: dict[Series, float] = {}  # of the last scrape

    def scrape(self) -> None:
        """Look once; an export that is not up yet has nothing."""
        with suppress(OSError):
            text = urllib.request.urlopen(self.url, timeout=5).read().decode()
            self._live = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith("ray_tutelage_"):
                        self.helps[sample.name] = family.documentation
                        self._take(sample.name, sample.labels, sample.value)

    def _take(self, name: str, labels: Mapping[str, str], value: float) -> None:
        own = tuple((label, labels[label]) for label in LABELS if label in labels)
        values = self._seen.setdefault((name, own), [])
        if values[-1:] != [value]:
            values.append(value)
        self._live[name, own] = value

    def of(self, metric: Metric, **labels: str) -> list[float]:
        """Every value of a series."""
        return self._seen.get(_series(metric, labels), [])

    def live(self, metric: Metric, **labels: str) -> float | None:
        """The value of a series in the last scrape, None where it was not there."""
        return self._live.get(_series(metric, labels))

    @property
    def names(self) -> set[str]:
        """Exported names of all that was seen."""
        return {name for name, _ in self._seen}


def _series(metric: Metric, labels: Mapping[str, str]) -> Series:
    return metric.exported, tuple((label, labels[label]) for label in LABELS if label in labels)


def export_url(node: Mapping[str, Any]) -> str:
    """Where a node, as `ray.nodes()` lists it, is scraped."""
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@contextmanager
def scraping(url: str) -> Iterator[Scrapes]:
    """Scrape for the length of a `with`, and once after it."""
    scrapes, ended = Scrapes(url), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            scrapes.scrape()
            time.sleep(EVERY_S)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield scrapes
    finally:
        ended.set()
        thread.join()
        scrapes.scrape()

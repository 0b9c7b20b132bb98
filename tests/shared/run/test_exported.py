"""The table of exported metrics, and the exporter that keeps their values alive."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from shared.run import exported, exporter
from shared.run.exported import METRICS, Table
from shared.run.exporter import EVERY_S, Exporter

Written = list[tuple[str, float, dict[str, str]]]


class Instruments:
    """A `Library` that writes down what it is told."""

    def __init__(self) -> None:
        self.written: Written = []

    def Gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(set=lambda value, tags: self.written.append((name, value, tags)))

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(inc=lambda value, tags: self.written.append((name, value, tags)))


@pytest.fixture
def library() -> Instruments:
    return Instruments()


@pytest.fixture
def export(library: Instruments) -> Iterator[Exporter]:
    export = Exporter(library, run="r")
    yield export
    export.close()


def test_names_labels_and_units_are_whole():
    assert len(METRICS) == len({metric.name for metric in METRICS})
    assert all(metric.unit and metric.help for metric in METRICS)
    assert 25 <= len(METRICS) <= 35


def test_a_name_is_defined_once():
    table = Table()
    table.define("loss", "nats", "loss", "trainer")
    with pytest.raises(ValueError, match="tutelage_loss is defined twice; give one another name"):
        table.define("loss", "nats", "another loss", "trainer")


@pytest.mark.parametrize(
    ("name", "labels", "sentence"),
    [
        ("tokens/s", ("run",), r"named 'tokens/s'; letters a to z"),
        ("Loss", ("run",), r"named 'Loss'"),
        ("loss", ("rank",), r"label 'rank'; labels are run, service, domain, replica"),
    ],
)
def test_what_prometheus_would_drop_is_refused(name, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        Table().define(name, "1", "help", "trainer", labels)


def test_a_gauge_is_set_again_until_it_is_gone_and_then_set_to_0_once(library, export):
    export.set(exported.LOSS, 1.5)
    time.sleep(2.5 * EVERY_S)
    assert library.written == [("tutelage_loss", 1.5, {"run": "r"})] * 3
    export.set(exported.LOSS, None)
    export.set(exported.LOSS, None)
    time.sleep(1.5 * EVERY_S)
    assert library.written[3:] == [("tutelage_loss", 0.0, {"run": "r"})]


def test_what_never_was_is_not_set_to_0(library, export):
    export.set(exported.KL, None, domain="code")
    assert library.written == []


def test_series_of_one_metric_are_kept_apart(library, export):
    export.set(exported.KL, 1.0, domain="code")
    export.set(exported.KL, 2.0, domain="math")
    export.set(exported.KL, None, domain="code")
    library.written.clear()
    export.refresh()
    assert library.written == [("tutelage_domain_kl", 2.0, {"run": "r", "domain": "math"})]


def test_counters_are_told_what_is_new_and_only_once(library, export):
    export.add(exported.TOKENS, 3, domain="code")
    export.add(exported.TOKENS, 0, domain="code")
    export.refresh()
    labels = {"run": "r", "domain": "code"}
    assert library.written == [("tutelage_loss_tokens", 3.0, labels)]


def test_samplers_are_asked_until_they_leave(library, export):
    asked = threading.Event()
    export.sample(asked.set)
    assert asked.wait(2 * EVERY_S)
    export.leave(asked.set)
    asked.clear()
    export.refresh()
    assert not asked.is_set()


def test_without_a_library_nothing_is_exported():
    exporter.current().set(exported.QUEUE_AGE, 1.0)  # its labels are missing, and nobody looks
    exporter.current().add(exported.TOKENS, 1)


def test_a_process_exports_for_the_length_of_a_with(library):
    with exporter.exporting(library, run="r"):
        exporter.current().set(exported.LOSS, 1.0)
    exporter.current().set(exported.LOSS, 2.0)
    assert library.written[-1] == ("tutelage_loss", 1.0, {"run": "r"})

"""Metrics in Ray's real export: what is set once stays, what is gone goes, also a second time."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from shared.config.models.teachers import Teacher
from shared.run import exported
from teacher_service.service import service
from tests.drills.commands import ROOT, wait_until
from tests.scraping import Scrapes, export_url
from tests.teacher_service.scripted import Scripted

pytestmark = pytest.mark.drill

FORGOTTEN_S = 25.0  # Ray drops a gauge that was not set for 20 s
PATIENCE_S = 60.0

# Two clusters, one after the other, of one process; it prints what each of them exports.
TWICE = """
import time
import ray, ray.util.metrics
from shared.run import exported
from shared.run.exporter import current, exporting
from tests.scraping import Scrapes, export_url
for number in (1.0, 2.0):
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    scrapes = Scrapes(export_url(ray.nodes()[0]))
    with exporting(ray.util.metrics, run="r"):
        current().set(exported.LOSS, number)
        while scrapes.live(exported.LOSS, run="r") is None:
            time.sleep(0.5)
            scrapes.scrape()
    print("seen", scrapes.of(exported.LOSS, run="r"))
    ray.shutdown()
"""


def seen(scrapes: Scrapes, condition: Callable[[], bool]) -> None:
    """Scrape until a condition holds."""

    def looked() -> bool:
        scrapes.scrape()
        return condition()

    wait_until(looked, patience_s=PATIENCE_S)


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_is_gone_is_0_and_what_stays_is_not_forgotten():
    import ray

    scrapes = Scrapes(export_url(ray.nodes()[0]))
    up = {name: {"service": "watched", "replica": name} for name in ("replica-0", "replica-1")}
    teacher = Teacher(model="any", cpus=0.1, replicas=2)
    service.start("watched", teacher, detached=True, make_engine=Scripted()).described()
    try:
        seen(scrapes, lambda: scrapes.live(exported.REPLICAS_PRESENT, service="watched") == 2)
        time.sleep(FORGOTTEN_S)
        scrapes.scrape()
        assert scrapes.of(exported.REPLICA_UP, **up["replica-0"])[-1] == 1
        assert scrapes.live(exported.REPLICA_UP, **up["replica-0"]) == 1
        seen(scrapes, lambda: scrapes.live(exported.REPLICA_BUSY, **up["replica-0"]) == 0)
        service.scale("watched", 1)
        seen(scrapes, lambda: scrapes.live(exported.REPLICA_UP, **up["replica-1"]) == 0)
        assert scrapes.live(exported.REPLICAS_WANTED, service="watched") == 1
        seen(scrapes, lambda: scrapes.live(exported.REPLICA_UP, **up["replica-1"]) is None)
        assert scrapes.live(exported.REPLICA_UP, **up["replica-0"]) == 1
    finally:
        service.stop("watched")
    seen(scrapes, lambda: scrapes.live(exported.REPLICAS_PRESENT, service="watched") == 0)
    seen(scrapes, lambda: scrapes.live(exported.REPLICAS_PRESENT, service="watched") is None)


def test_a_second_cluster_of_one_process_has_metrics_too():
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("seen")]
    assert lines == ["seen [1.0]", "seen [2.0]"], done.stderr

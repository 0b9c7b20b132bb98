"""A run on a cluster with a dashboard, watched by a real Prometheus and by Ray's own tabs."""

import json
import re
import shutil
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring.panels import SECTIONS, query
from shared.config.run import Config
from shared.run import exported
from shared.run.exported import Metric
from shared.run.metrics import StepMetrics, read_metrics
from shared.run.run_dir import RunDir
from student_trainer.metrics.exported import measured
from tests.cluster.jobs import with_all_that_is_exported, write_job
from tests.drills.commands import Command, Home, reached, wait_until
from tests.drills.nodes import free_ports

pytestmark = pytest.mark.drill

SCRAPE_S = 10.0  # as Ray's own config says
WITHOUT_AUTHENTICATION = {"RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True)
class Watched:
    """What was seen of a run."""

    config: Config
    lines: list[StepMetrics]
    prometheus: str
    began: float
    ended: float
    actors: list[dict[str, Any]]  # of Ray's dashboard, in mid-run
    trained: list[tuple[str, str]]  # its Train runs and their states, in mid-run and after it

    def asked(self, metric: Metric) -> dict[str, list[float]]:
        """What the query of a metric's panel has found, by the values of its labels."""
        expression = re.sub(r"\$\w+", ".*", query(metric))
        found = _ask(
            f"{self.prometheus}/api/v1/query_range",
            query=expression,
            start=self.began,
            end=self.ended,
            step=5,
        )
        return {
            " ".join(series["metric"][label] for label in metric.labels): [
                float(value) for _, value in series["values"]
            ]
            for series in found["data"]["result"]
        }


def _ask(url: str, **parameters: Any) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}") as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_pair):
    """A run that lasts for several scrapes."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not on the path (Debian has a package of that name)")
    from tests.drills.conftest import homes

    folder = tmp_path_factory.mktemp("watched")
    parts = with_all_that_is_exported(tiny_pair)
    job = write_job(folder, tiny_pair, steps=400, log_every=1, checkpoints={"every": 400}, **parts)
    for home in homes():
        yield _watch(home, job, binary, folder)


def _watch(home: Home, job: Path, binary: str, folder: Path) -> Watched:
    port, dashboard_port, client_port, prometheus_port, agent_port = free_ports(5)
    head = home.ray(
        "start", "--block", "--head", "--num-cpus=4", f"--port={port}",
        f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}",
        f"--dashboard-agent-listen-port={agent_port}", "--object-store-memory=200000000",
        "--disable-usage-stats", **WITHOUT_AUTHENTICATION,
    )  # fmt: skip
    wait_until(lambda: "Ray runtime started" in head.output, doing=head)
    address = f"127.0.0.1:{port}"
    said = home.run("monitor", "up", "--address", address, **WITHOUT_AUTHENTICATION)
    (config,) = re.findall(r"--config\.file=(\S+)", said)
    prometheus = home.execute(
        binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{prometheus_port}",
    )  # fmt: skip
    began = time.time()
    run = home.start("run", str(job), "--address", address, **WITHOUT_AUTHENTICATION)
    at = folder / "runs" / "job"
    wait_until(reached(at, 5), doing=run)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    actors = _ask(f"{dashboard}/api/v0/actors", detail="true", limit=1000)
    trained = _trained(dashboard)
    assert run.wait() == 0, run.output
    trained += _trained(dashboard)
    _after_two_scrapes(prometheus)
    return Watched(
        RunDir(at).recorded_config(),
        read_metrics(at / "metrics.jsonl"),
        f"http://127.0.0.1:{prometheus_port}",
        began,
        time.time(),
        actors["data"]["result"]["result"],
        trained,
    )


def _trained(dashboard: str) -> list[tuple[str, str]]:
    runs = _ask(f"{dashboard}/api/train/v2/runs/v1")["train_runs"]
    return [(run["name"], run["status"]) for run in runs]


def _after_two_scrapes(prometheus: Command) -> None:
    time.sleep(2 * SCRAPE_S)
    assert prometheus.running, prometheus.output


@pytest.mark.parametrize(
    "metric",
    [metric for panels in SECTIONS.values() for panel in panels for metric in panel.metrics],
    ids=lambda metric: metric.name,
)
def test_every_query_of_the_dashboard_finds_something(watched: Watched, metric: Metric):
    assert watched.asked(metric)


def test_prometheus_has_seen_the_last_line_of_metrics_jsonl(watched: Watched):
    told = list(measured(watched.lines[-1], watched.config, steps_in_line=1))
    for metric, labels, value in told:
        series = " ".join({"run": "job", **labels}[label] for label in metric.labels)
        assert value is not None, metric.name
        assert watched.asked(metric)[series][-1] == pytest.approx(value), metric.name
    assert len(told) > 20
    for name in watched.config.domains:
        assert max(watched.asked(exported.TOKENS)[f"job {name}"]) > 0


def test_every_loss_that_prometheus_has_seen_is_of_a_line(watched: Watched):
    losses = [line.loss for line in watched.lines]
    seen = set(watched.asked(exported.LOSS)["job"])
    assert len(seen) >= 3
    assert all(any(value == pytest.approx(loss) for loss in losses) for value in seen)


def test_the_dashboard_of_ray_names_actors_and_the_training(watched: Watched):
    alive = [actor for actor in watched.actors if actor["state"] == "ALIVE"]
    shown = {(actor["name"], actor["repr_name"]) for actor in alive}
    service = next(a["ray_namespace"] for a in alive if a["class_name"] == "TeacherReplica")
    replica, controller = f"{service}/replica-0", "controller(job)"
    assert {(replica, replica), (controller, controller)} <= shown
    assert f"registry({service})" in {repr_name for _, repr_name in shown}
    assert watched.trained == [("job", "RUNNING"), ("job", "FINISHED")]

"""`tutelage monitor up`: the dashboard shows every metric, and its files name what exists."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.monitoring.panels import RATE_WINDOW, SECTIONS, dashboard, query
from shared.run import exported
from shared.run.exported import METRICS
from tests.scraping import export_url

NAME = re.compile(r"ray_tutelage_\w+")


def test_every_metric_is_in_one_panel_and_no_other_is():
    shown = [m for panels in SECTIONS.values() for panel in panels for m in panel.metrics]
    assert sorted(m.name for m in shown) == sorted(m.name for m in METRICS)


def test_every_query_of_the_dashboard_names_a_metric_that_exists():
    described = json.loads(dashboard())
    names = NAME.findall(json.dumps(described))
    assert set(names) == {metric.exported for metric in METRICS}
    places = [
        (x, y)
        for panel in described["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


def test_queries_join_the_processes_of_a_series_as_its_metric_says():
    assert query(exported.LOSS) == 'max by (run) (ray_tutelage_loss{run=~"$run"})'
    in_flight = (
        'sum by (run, service) (ray_tutelage_units_in_flight{run=~"$run", service=~"$service"})'
    )
    assert query(exported.UNITS_IN_FLIGHT) == in_flight
    tokens = f'rate(ray_tutelage_loss_tokens_total{{run=~"$run"}}[{RATE_WINDOW}])'
    assert query(exported.TOKENS) == f"sum by (run, domain) ({tokens})"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_files_lead_prometheus_and_grafana_to_the_cluster(elsewhere, tmp_path, capsys):
    import ray

    assert main(["monitor", "up", *(["--to", str(tmp_path)] * elsewhere)]) == 0
    said = capsys.readouterr().out
    scraped, shown = (Path(p) for p in re.findall(r"--config[ .a-z]*=?(\S+\.(?:yml|ini))", said))
    (job,) = yaml.safe_load(scraped.read_text())["scrape_configs"]
    (listed,) = (Path(path) for part in job["file_sd_configs"] for path in part["files"])
    (node,) = ray.nodes()
    assert json.loads(listed.read_text())[0]["targets"] == [export_url(node).split("/")[2]]
    assert (shown.is_relative_to(tmp_path), scraped.is_relative_to(tmp_path)) == (elsewhere,) * 2
    (provisioning,) = re.findall(r"provisioning = (\S+)", shown.read_text())
    provider = yaml.safe_load((Path(provisioning) / "dashboards/default.yml").read_text())
    folder = Path(provider["providers"][0]["options"]["path"])
    assert (folder / "tutelage_grafana_dashboard.json").read_text() == dashboard()
    sources = yaml.safe_load((Path(provisioning) / "datasources/default.yml").read_text())
    assert sources["datasources"][0]["url"] == "http://localhost:9090"
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "config", scraped], check=True, capture_output=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["monitor", "up", "--to", str(tmp_path / "file" / "folder")]) == 2
    assert "name another place" in capsys.readouterr().err

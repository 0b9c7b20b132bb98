"""Files of Prometheus and Grafana: what to scrape, where to look for it, and the dashboard.

They have the layout of what a Ray head with a dashboard writes into its session's `metrics/`, so
that they are found there.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.monitoring.panels import dashboard
from shared.run.run_dir import write_atomically

PROMETHEUS = Path("prometheus/prometheus.yml")
GRAFANA = Path("grafana/grafana.ini")
DASHBOARDS = Path("grafana/dashboards")
OWN = DASHBOARDS / "tutelage_grafana_dashboard.json"
TARGETS = Path("prometheus/targets.json")
PROVISIONING = Path("grafana/provisioning")
PROMETHEUS_URL = "http://localhost:9090"


def write_files(
    folder: Path, nodes: Iterable[Mapping[str, Any]], *, discovery: Path, keeps: bool
) -> None:
    """Write everything into `folder`; what Ray has written there stays where it `keeps` that.

    `discovery` is Ray's list of what to scrape; where there is none, the nodes of this moment are
    listed.
    """
    if not discovery.exists():
        discovery = folder / TARGETS
        _write(discovery, json.dumps(targets(nodes)) + "\n")
    for path, text in _settings(folder, discovery).items():
        if not (keeps and (folder / path).exists()):
            _write(folder / path, text)
    _write(folder / OWN, dashboard())


def targets(nodes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Nodes, as `ray.nodes()` lists them, as Prometheus reads them from a file."""
    alive = (node for node in nodes if node["Alive"])
    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive]
    return [{"labels": {"job": "ray"}, "targets": sorted(addresses)}]


def _settings(folder: Path, discovery: Path) -> dict[Path, str]:
    from ray.dashboard.modules.metrics import templates  # with Ray's own words

    scraped = templates.PROMETHEUS_YML_TEMPLATE.format(
        prom_metrics_service_discovery_file_path=discovery
    )
    sources = templates.GRAFANA_DATASOURCE_TEMPLATE(
        prometheus_name="Prometheus", prometheus_host=PROMETHEUS_URL, jsonData={}, secureJsonData={}
    )
    return {
        PROMETHEUS: scraped,
        GRAFANA: templates.GRAFANA_INI_TEMPLATE.format(
            grafana_provisioning_folder=folder / PROVISIONING
        ),
        PROVISIONING / "dashboards/default.yml": templates.DASHBOARD_PROVISIONING_TEMPLATE.format(
            dashboard_output_folder=folder / DASHBOARDS
        ),
        PROVISIONING / "datasources/default.yml": sources,
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)

"""`tutelage monitor`: what Prometheus and Grafana need to watch a cluster."""

from pathlib import Path
from typing import Any

from cluster.monitoring.files import GRAFANA, OWN, PROMETHEUS, write_files
from cluster.session.session import attached
from shared.errors import ConfigError

DISCOVERY = "prom_metrics_service_discovery.json"  # as Ray calls it, in a session's folder


def up(*, address: str | None = None, to: Path | None = None) -> None:
    """`tutelage monitor up`: write the files, and say how to start what reads them."""
    with attached(address):
        import ray

        session = _session_dir()
        folder = to.absolute() if to is not None else session / "metrics"
        if to is None and not session.is_dir():
            raise ConfigError(
                f"the cluster's session folder {session} is not on this machine; run the same "
                "command on its head, or name a folder with --to"
            )
        discovery = session / DISCOVERY
        keeps = to is None and discovery.exists()  # then Ray's dashboard writes there, too
        write_files(folder, ray.nodes(), discovery=discovery, keeps=keeps)
    print(f"Dashboard  {folder / OWN}")
    print(f"Scrape     prometheus --config.file={folder / PROMETHEUS}")
    print(f"Show       grafana-server --homepath /usr/share/grafana --config {folder / GRAFANA}")
    print("\nStart both, then open http://localhost:3000/d/tutelage")


def _session_dir() -> Path:
    """Where the cluster keeps its files, on its head."""
    from ray._private import worker

    node: Any = worker._global_node
    return Path(node.get_session_dir_path())

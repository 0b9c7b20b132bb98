"""The verbs of the command line for Prometheus and Grafana."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.arguments import Address

monitor = typer.Typer(
    help="Prometheus and Grafana beside a cluster.", no_args_is_help=True, rich_markup_mode=None
)


@monitor.callback()
def _monitor() -> None:
    """A group, also while it has one verb."""


@monitor.command("up")
def monitor_up(
    address: Address = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Instead of the cluster's own folder."),
    ] = None,
) -> None:
    """Write a scrape config and a dashboard for both.

    Says how Prometheus and Grafana are started.
    """
    from cluster.commands import monitor

    monitor.up(address=address, to=to)

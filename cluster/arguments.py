"""Arguments and options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Overrides of the config.")
]
Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a Ray cluster, or `local` for a private one."),
]
Service = Annotated[str | None, typer.Option(help="Name of the teacher service.")]
Store = Annotated[
    str, typer.Argument(metavar="STORE", help="A config, or a store's folder or address.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; the old folder is moved aside.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/NAME.")]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, as http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, or "
        "one on this machine.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="ID", help="A job of `tutelage jobs ls`.")]

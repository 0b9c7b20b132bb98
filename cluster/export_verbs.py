"""The verb of the command line that hands a run's student on."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.arguments import RunFolder


def export(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option(help="A new folder; default: RUN/export, or RUN/merged.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Base and adapter as one model, as servers take it.")
    ] = False,
) -> None:
    """Write a run's newest checkpoint as a folder to be loaded.

    transformers or peft load it by themselves.
    """
    from cluster.commands import exports

    exports.export(run, to=to, merge=merge)

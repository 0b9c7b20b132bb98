"""The verbs of the command line about clusters elsewhere: runs as jobs of one, and what it is
started from."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.arguments import ConfigPath, Dashboard, Fresh, JobName, Overrides

jobs = typer.Typer(
    help="Runs that were submitted to a cluster.", no_args_is_help=True, rich_markup_mode=None
)


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Dashboard = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
    fresh: Fresh = False,
) -> None:
    """Run a config as a job of a cluster, and follow its log.

    The job takes the current folder along; Ctrl-C leaves it at work.
    """
    from cluster.commands import jobs

    jobs.submit(config, overrides or [], address=address, detach=detach, fresh=fresh)


@jobs.command("ls")
def jobs_ls(address: Dashboard = None) -> None:
    """A line per job.

    How it stands, when it began, how long it took, what it is.
    """
    from cluster.commands import jobs

    jobs.ls(address=address)


@jobs.command("logs")
def jobs_logs(
    job: JobName,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """Print what a job has said."""
    from cluster.commands import jobs

    jobs.logs(job, address=address, follow=follow)


@jobs.command("stop")
def jobs_stop(job: JobName, address: Dashboard = None) -> None:
    """Stop a job once the step under way is saved.

    Submitted again it goes on.
    """
    from cluster.commands import jobs

    jobs.stop(job, address=address)


def manifests(
    to: Annotated[Path, typer.Argument(metavar="[FOLDER]")] = Path("manifests"),
    image: Annotated[
        str | None, typer.Option(metavar="NAME", help="The image that nodes run, with its tag.")
    ] = None,
) -> None:
    """Write what a cluster is started from.

    A Dockerfile, KubeRay's manifests and a config of Ray's cluster launcher.
    """
    from cluster.commands import manifests
    from cluster.manifests.facts import IMAGE

    manifests.write(to, image=image or IMAGE)

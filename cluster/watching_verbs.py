"""The verbs of the command line that look at machines, clusters and runs, and ahead."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.arguments import Address, ConfigPath, Overrides, RunFolder, Service


def status(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, for where it stands.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of runs.")] = Path("runs"),
    address: Address = None,
    reap: Annotated[bool, typer.Option("--reap", help="Remove what dead runs left.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Services, runs and leftovers; with RUN, where that one stands."""
    from cluster.commands import status

    if run is not None:
        status.status_of_run(run, watch=watch, as_json=as_json)
    elif watch or as_json:
        raise typer.BadParameter("--watch and --json are of one run; name its folder")
    else:
        status.status(runs, address=address, reap=reap)


def doctor(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Examine this machine and the nodes of the cluster.

    Versions, GPUs, memory, disks.
    """
    from cluster.commands import doctor

    doctor.doctor(address=address, as_json=as_json)


def evaluate(
    run: RunFolder,
    service: Service = None,
    address: Address = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Another run, whose student stands beside this one."),
    ] = None,
    generate: Annotated[
        int, typer.Option(metavar="N", min=0, help="Prompts a domain that models answer; 0: none.")
    ] = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Of an answer; default: as right ones need."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Instead: a task of lm-evaluation-harness, by name or YAML file; again."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="With --task: teacher or before, beside the export."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --task: examples, at most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare teacher, student before and after on validation text.

    The student is loaded from its export, made anew where there is a newer checkpoint. With --task
    RUN may also be the folder of a model.
    """
    from cluster.commands.evaluate import evaluate
    from cluster.commands.tasks import evaluate_tasks

    if task:
        if compare is not None:
            raise typer.BadParameter("--compare is for validation text, not for --task")
        evaluate_tasks(run, task, also=also or [], limit=limit, as_json=as_json)
        return
    if also or limit is not None:
        raise typer.BadParameter("--also and --limit are for tasks; name one with --task")
    evaluate(
        run,
        service=service,
        address=address,
        compare=compare,
        generate=generate,
        max_new_tokens=max_new_tokens,
        as_json=as_json,
    )


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="The GPUs by name, as H100.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a GPU, as 80GiB.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a machine; default: of this one.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU, an hour.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Take the first steps and measure them.")
    ] = False,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a run takes: memory by part, wire, disk, time, cost.

    Reads config.json, no weights; with --probe, it takes the first steps instead of guessing.
    """
    from cluster.commands import plan

    plan.plan(
        config,
        overrides or [],
        gpu=gpu,
        gpu_memory=gpu_memory,
        memory=memory,
        price=price,
        probe=probe,
        address=address,
        as_json=as_json,
    )

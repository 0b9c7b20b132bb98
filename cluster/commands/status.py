"""What is running, what is finished, and what dead commands left behind; where one run stands."""

import json
import sys
import time
from pathlib import Path

from cluster.report.standing import Standing, in_use, read_standing
from cluster.session import ray_head
from cluster.session.interrupts import interrupted_as
from cluster.session.session import attached, find_address
from shared.config.models.teachers import Autoscaling
from shared.config.paths import without_job_folder
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir

WATCH_S = 1.0
INTERRUPTED = "Interrupted; the run is not, and the same command watches it again."


def status(runs: Path, *, address: str | None = None, reap: bool = False) -> None:
    """`tutelage status`: the cluster, its teacher services, the runs of a folder, leftovers."""
    if find_address(address) is None:
        print("Cluster   none is running here")
    else:
        with attached(address):
            _say_cluster()
            _say_services(reap=reap)
    orphans = len(ray_head.orphans())
    if reap:
        ray_head.reap()
    if orphans:
        print(f"Leftover  {orphans} processes of a dead cluster" + (", removed" if reap else ""))
    for run_dir in _runs(runs):
        print(f"Run       {run_dir.path.name}: {_said(run_dir)}")


def _say_cluster() -> None:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    total, free = ray.cluster_resources(), ray.available_resources()
    amounts = ", ".join(
        f"{free.get(name, 0):g} of {total[name]:g} {name} free"
        for name in ("CPU", "GPU")
        if total.get(name)
    )
    print(f"Cluster   {len(nodes)} node{'s' if len(nodes) != 1 else ''}, {amounts}")


def _say_services(*, reap: bool) -> None:
    from teacher_service.service import service

    for name in service.list_services():
        found = service.status(name)
        if found.teacher is None and reap:
            service.stop(name)
        if found.teacher is None:
            print(f"Leftover  half-dead teacher service {name}" + (", removed" if reap else ""))
            continue
        alive = sum(replica.state == "alive" for replica in found.replicas)
        scale, bounds = found.scale, found.teacher.replicas
        wanted = scale.wanted if scale else len(found.replicas)
        own = f", from {bounds.min} to {bounds.max}" if isinstance(bounds, Autoscaling) else ""
        model = without_job_folder(found.teacher.model)
        print(f"Teacher   {name}: {model}, {alive} of {wanted} serve{own}")


def _runs(runs: Path) -> list[RunDir]:
    found = [*runs.glob("*/config.yaml"), *runs.glob("*/stages/*/config.yaml")]
    return [RunDir(path.parent) for path in sorted(found)]


def _said(run_dir: RunDir) -> str:
    config, lines = run_dir.recorded_config(), read_metrics(run_dir.metrics)
    step = f"step {lines[-1].step if lines else 0} of {config.steps}"
    if in_use(run_dir):
        return f"at work, {step}"
    return f"finished, {step}" if run_dir.finished else f"unfinished, {step}; run it again"


def status_of_run(run: Path, *, watch: bool = False, as_json: bool = False) -> None:
    """`tutelage status RUN`: progress, losses, mixture, replicas, failures; with `watch` until the
    run is no longer at work. Raises ConfigError where the folder holds no run."""
    run_dir = RunDir(run.absolute())
    run_dir.recorded_config()
    if not watch:
        _show(read_standing(run_dir), as_json=as_json)
        return
    with interrupted_as(lambda: INTERRUPTED):
        if as_json or not sys.stdout.isatty():
            _follow(run_dir, as_json=as_json)
        else:
            _watch(run_dir)


def _show(standing: Standing, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(standing), flush=True)
        return
    from rich.console import Console

    from cluster.report.live_view import view

    Console(highlight=False).print(view(standing))


def _follow(run_dir: RunDir, *, as_json: bool) -> None:
    """Where no terminal can be redrawn: what is new, whenever there is something."""
    told: tuple[int, str] | None = None
    while True:
        standing = read_standing(run_dir)
        if told != (told := (standing["step"], standing["state"])):
            _show(standing, as_json=as_json)
        if standing["state"] != "at work":
            return
        time.sleep(WATCH_S)


def _watch(run_dir: RunDir) -> None:
    """A view that is drawn again while the run is at work."""
    from rich.live import Live

    from cluster.report.live_view import view

    with Live(auto_refresh=False) as live:
        while True:
            standing = read_standing(run_dir)
            live.update(view(standing), refresh=True)
            if standing["state"] != "at work":
                return
            time.sleep(WATCH_S)

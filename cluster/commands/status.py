"""What is running, what is finished, and what dead commands left behind."""

from pathlib import Path

from filelock import FileLock, Timeout

from cluster.session import ray_head
from cluster.session.session import attached, find_address
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir


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
        print(f"Teacher   {name}: {found.teacher.model}, {alive} of {len(found.replicas)} serve")


def _runs(runs: Path) -> list[RunDir]:
    return [RunDir(path.parent) for path in sorted(runs.glob("*/config.yaml"))]


def _said(run_dir: RunDir) -> str:
    config, lines = run_dir.recorded_config(), read_metrics(run_dir.metrics)
    step = f"step {lines[-1].step if lines else 0} of {config.steps}"
    if _in_use(run_dir):
        return f"at work, {step}"
    return f"finished, {step}" if run_dir.finished else f"unfinished, {step}; run it again"


def _in_use(run_dir: RunDir) -> bool:
    lock = FileLock(run_dir.path.parent / f".{run_dir.path.name}.lock", timeout=0)
    try:
        with lock:
            return False
    except Timeout:
        return True

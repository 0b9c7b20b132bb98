"""`tutelage doctor`: what this machine, and each node of its cluster, has that a run needs."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict

from cluster.doctor.findings import Finding, Verdict, compare, examine
from cluster.doctor.machine import Machine, look
from shared.config.run import Paths
from shared.errors import PlacementError, UserError

ABOUT_WIDTH = 26
NODE_DEADLINE_S = 60.0


def doctor(*, address: str | None = None, as_json: bool = False) -> None:
    """Print a line per finding, with its cure below; with `as_json` one JSON object instead.

    Raises UserError where a run could not work.
    """
    folders = _folders()
    here = look(folders)
    found = [*examine(here), *_of_cluster(here, folders, address)]
    if as_json:
        print(json.dumps({"machine": asdict(here), "findings": [asdict(f) for f in found]}))
    else:
        for finding in found:
            print(f"{finding.verdict:<8}{finding.about:<{ABOUT_WIDTH}}{finding.said}")
            if finding.cure:
                print(f"{'':<{8 + ABOUT_WIDTH}}{finding.cure}")
    fatal = list(dict.fromkeys(f.about for f in found if f.verdict is Verdict.FATAL))
    if fatal:
        raise UserError(f"no run can work before this is mended: {', '.join(fatal)}")


def _folders() -> dict[str, str]:
    """Where a run writes, unless its config names other places."""
    paths = Paths()
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return {"runs": paths.runs, "cache": paths.cache, "models of the hub": hub}


def _of_cluster(here: Machine, folders: Mapping[str, str], address: str | None) -> list[Finding]:
    """What the nodes of the cluster tell that a run would join; a line where there is none."""
    from cluster.session.session import connected, find_address, is_connected

    try:
        if not is_connected() and find_address(address) is None:
            said = "none is running; `tutelage run` starts one of its own"
            return [Finding("cluster", Verdict.NOTE, said)]
        with connected(address):
            return _of_nodes(here, folders)
    except PlacementError as error:
        return [Finding("cluster", Verdict.FATAL, str(error))]


def _of_nodes(here: Machine, folders: Mapping[str, str]) -> list[Finding]:
    """Each node looks at itself, without taking any of its resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
    task = ray.remote(look)
    asked = {
        host: task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(folders)
        for node, host in nodes.items()
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=NODE_DEADLINE_S)
    found, told = [], []
    for host, answer in asked.items():
        try:
            told.append(ray.get(answer, timeout=0.1))
        except Exception as error:  # whatever a node's environment lacks
            found.append(_silent(host, error))
    said = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, Ray {ray.__version__}"
    return [Finding("cluster", Verdict.OK, said), *found, *compare(here, told)]


def _silent(host: str, error: Exception) -> Finding:
    """A node that could not look at itself."""
    lines = str(error).strip().splitlines()
    reason = (lines[-1] if lines else type(error).__name__)[:200]
    cure = "install Tutelage there, as here; its processes load it from the node's own environment"
    return Finding(f"node {host}", Verdict.FATAL, f"runs no process of ours: {reason}", cure)

"""The copy of a working folder in which Ray runs a job's command.

Nodes that `ray start` makes on one machine share the folder of Ray's session. Once a driver has
joined, each of them removes the copy that lies there and unpacks it again (Ray 2.60,
`download_and_unpack_package`): under a command that works in it, whose next import then fails, and
under workers that come up. Joined again, none does, since each has it by then.
"""

import importlib
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.config.paths import JOB_FOLDERS
from shared.errors import PlacementError

UNPACKED_S = 60.0
POLL_S = 0.2


def current_copy() -> str | None:
    """The copy that this command imports from; None where it is no job's."""
    return next((path for path in sys.path if JOB_FOLDERS in path), None)


def settled(copy: str | None, *, deadline_s: float = UNPACKED_S) -> bool:
    """Wait, as a driver, until the other nodes that share the copy have unpacked it; whether there
    are any. Workers that came up meanwhile may have missed it: the driver joins again. Raises
    PlacementError where the copy is gone at the deadline."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if copy is None or not (nodes := _sharing(copy)):
        return False
    nothing: Any = ray.remote(num_cpus=0)(lambda: None)  # by value: it imports none of our modules
    unpacked = [
        nothing.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in nodes
    ]
    ends = time.monotonic() + deadline_s
    ray.wait(unpacked, num_returns=len(unpacked), timeout=deadline_s)
    enter(copy, patience_s=max(0.0, ends - time.monotonic()))
    importlib.invalidate_caches()  # what was not found while it was away
    return True


def enter(copy: str, *, patience_s: float) -> None:
    """Work in a copy where the folder that this process worked in was removed, once it is there
    again. Raises PlacementError where it does not come."""
    deadline = time.monotonic() + patience_s
    while not _works_somewhere():
        with suppress(FileNotFoundError):
            os.chdir(copy)
            return
        if time.monotonic() >= deadline:
            raise PlacementError(
                f"Ray removed the folder that this job works in, {copy}, and has not unpacked it "
                "again, as where a disk is full or a node of this machine hangs; look at the "
                "nodes in the dashboard and submit the job again"
            )
        time.sleep(POLL_S)


def _works_somewhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _sharing(copy: str) -> list[str]:
    """The other nodes whose session has the folder of the copy."""
    import ray

    session = Path(copy.partition(JOB_FOLDERS)[0])
    own = ray.get_runtime_context().get_node_id()
    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    here = known.pop(own)["NodeManagerAddress"]
    return [
        name
        for name, node in known.items()
        if node["NodeManagerAddress"] == here and session in Path(node["RayletSocketName"]).parents
    ]

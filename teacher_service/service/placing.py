"""Where replicas of a service go: a placement group each, of the resources that one asks for."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shared.errors import PlacementError
from teacher_service.service.naming import Request, lifetime_of

PLACEMENT_WAIT_S = 6.0
ROLE_SHARE = 0.01  # of the custom resource of a role: it says where, not how many
HEAD = "node:__internal_head__"  # what Ray lets the head declare
GROUP_PREFIX = "tutelage-teacher:"


def place(service: str, names: list[str], request: Request) -> list[PlacementGroup]:
    """A group for each replica of these names. Raises PlacementError within 10 s where they do not
    fit; groups that were made are left to the caller."""
    bundle, ranks = _bundle(request), request.teacher.tensor_parallel
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free: dict[str, dict[str, float]] = available_resources_per_node()
    missing, groups = len(names) - _room(bundle, free.values()) // ranks, []
    room = _room(bundle, (node["Resources"] for node in nodes)) // ranks
    if len(names) <= room:  # waiting can help
        groups = [ask_for_place(service, name, request) for name in names]
        deadline = time.monotonic() + PLACEMENT_WAIT_S
        missing = sum(not group.wait(max(0.0, deadline - time.monotonic())) for group in groups)
    if missing > 0:
        there = ", ".join(
            f"{_amounts({name: free.get(node['NodeID'], {}).get(name, 0.0) for name in bundle})} "
            f"on {node['NodeManagerAddress']}"
            for node in nodes
        )
        needed = f"{_amounts(bundle)} on one node"
        if ranks > 1:
            needed = f"{ranks} times {_amounts(bundle)}"
        raise PlacementError(
            f"{missing} of {len(names)} {request.role} replicas do not fit: each needs "
            f"{needed}, and there was free: {there}; stop something, add a "
            "node, or lower the replicas or what each asks for"
        )
    return groups


def ask_for_place(service: str, name: str, request: Request) -> PlacementGroup:
    """Ask Ray for the place of one replica, which an autoscaler may add a node for; waits for
    nothing."""
    return placement_group(
        [_bundle(request)] * request.teacher.tensor_parallel,
        strategy="PACK",  # on one node if any has room for all ranks
        name=group_name(service, name),
        lifetime=lifetime_of(request.detached),
    )


def head_node() -> NodeAffinitySchedulingStrategy | None:
    """Where actors without resources go: the head, which no autoscaler takes away. None where no
    node says that it is the head."""
    for node in ray.nodes():
        if node["Alive"] and HEAD in node["Resources"]:
            return NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
    return None


def _room(bundle: dict[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many bundles nodes with these resources hold."""
    return sum(
        int(min(node.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6)
        for node in nodes
    )


def _bundle(request: Request) -> dict[str, float]:
    """What one process needs: a replica, or each rank of one."""
    role, teacher = request.role, request.teacher
    declared = any(role in node["Resources"] for node in ray.nodes() if node["Alive"])
    wanted = {
        "CPU": float(teacher.rank_cpus),
        "GPU": float(teacher.rank_gpus),
        role: ROLE_SHARE if declared else 0.0,
    }
    return {name: amount for name, amount in wanted.items() if amount} or {"CPU": ROLE_SHARE}


def _amounts(resources: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items())


@dataclass(frozen=True, slots=True)
class Group:
    """A placement group, and whether it has a place."""

    handle: PlacementGroup
    placed: bool


def group_name(service: str, replica: str) -> str:
    """Name of a replica's placement group."""
    return f"{GROUP_PREFIX}{service}:{replica}"


def groups_of(service: str | None = None) -> dict[str, Group]:
    """Placement groups by name, of one service or of all, those that are not removed yet."""
    table: dict[str, dict[str, Any]] = placement_group_table()
    prefix = GROUP_PREFIX if service is None else group_name(service, "")
    return {
        entry["name"]: Group(
            PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))), entry["state"] == "CREATED"
        )
        for key, entry in table.items()
        if entry["name"].startswith(prefix) and entry["state"] != "REMOVED"
    }

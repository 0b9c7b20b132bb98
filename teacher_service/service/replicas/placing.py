"""Where replicas of a service go: a placement group each, of the resources that one asks for."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from shared.errors import PlacementError
from teacher_service.service.replicas.naming import Request, lifetime_of
from teacher_service.service.replicas.nodes import (
    ADDED_S,
    NONE_TO_ADD,
    Outlook,
    autoscales,
    came,
    declares,
)

PLACEMENT_WAIT_S = 6.0
ROLE_SHARE = 0.01  # of the custom resource of a role: it says where, not how many
GROUP_PREFIX = "tutelage-teacher:"


def place(service: str, names: list[str], request: Request) -> list[PlacementGroup]:
    """A group for each replica of these names, for which an autoscaler may add nodes. Raises
    PlacementError where they do not fit, within 10 s where there is none; groups that were made are
    left to the caller."""
    bundle, ranks = _bundle(request), request.teacher.tensor_parallel
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free: dict[str, dict[str, float]] = available_resources_per_node()
    missing, groups = len(names) - _room(bundle, free.values()) // ranks, []
    room = _room(bundle, (node["Resources"] for node in nodes)) // ranks
    outlook = Outlook()
    if (grows := autoscales()) or len(names) <= room:  # waiting can help
        groups = [ask_for_place(service, name, request) for name in names]
        missing = _unplaced(groups, PLACEMENT_WAIT_S, outlook)
        if missing and grows:
            print(waiting_for(f"{missing} {request.role} replicas"), flush=True)
            missing = _unplaced(groups, ADDED_S, outlook)
    if missing > 0:
        there = ", ".join(
            f"{_amounts({name: free.get(node['NodeID'], {}).get(name, 0.0) for name in bundle})} "
            f"on {node['NodeManagerAddress']}"
            for node in nodes
        )
        needed = f"{_amounts(bundle)} on one node"
        if ranks > 1:
            needed = f"{ranks} times {_amounts(bundle)}"
        autoscaler = f"; the cluster's autoscaler {NONE_TO_ADD}" if outlook.hopeless else ""
        raise PlacementError(
            f"{missing} of {len(names)} {request.role} replicas do not fit: each needs "
            f"{needed}, and there was free: {there}{autoscaler}; stop something, add a "
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


def _unplaced(groups: list[PlacementGroup], deadline_s: float, outlook: Outlook) -> int:
    """How many groups have no place at a deadline, or once waiting is hopeless."""
    deadline = time.monotonic() + deadline_s
    return sum(not came(group, deadline=deadline, outlook=outlook) for group in groups)


def _room(bundle: dict[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many bundles nodes with these resources hold."""
    return sum(
        int(min(node.get(name, 0.0) / amount for name, amount in bundle.items()) + 1e-6)
        for node in nodes
    )


def _bundle(request: Request) -> dict[str, float]:
    """What one process needs: a replica, or each rank of one."""
    role, teacher = request.role, request.teacher
    wanted = {
        "CPU": float(teacher.rank_cpus),
        "GPU": float(teacher.rank_gpus),
        role: ROLE_SHARE if declares(role) else 0.0,
    }
    return {name: amount for name, amount in wanted.items() if amount} or {"CPU": ROLE_SHARE}


def waiting_for(what: str) -> str:
    """The line for people where an autoscaler is asked for nodes."""
    return (
        f"no room yet for {what}; the cluster's autoscaler is asked for nodes, which are waited "
        f"for up to {ADDED_S:g} s"
    )


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

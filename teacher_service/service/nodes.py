"""Nodes of a cluster: its head, and those that an autoscaler may add."""

import json
import time
from collections.abc import Mapping, Sequence

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

HEAD = "node:__internal_head__"  # what Ray lets the head declare
HEAD_SHARE = 0.0001  # the least that Ray takes; the head has one
ROLES = ("teacher", "student")
ADDED_S = 900.0  # a node of a cloud may take ten minutes to come
POLL_S = 1.0


def of_the_head() -> dict[str, float]:
    """What an actor that needs nothing asks for to live on the head, which no autoscaler takes
    away; nothing where no node says that it is the head. It works where the head has no CPUs."""
    heads = [node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    return {HEAD: HEAD_SHARE} if heads else {}


def declares(role: str) -> bool:
    """Whether processes of a role ask for its resource: where a node has it, or may come with it,
    since others have another role's."""
    there = {name for node in ray.nodes() if node["Alive"] for name in node["Resources"]}
    return role in there or (not there.isdisjoint(ROLES) and autoscales())


def autoscales() -> bool:
    """Whether an autoscaler may add nodes to the cluster. Ray's second generation runs only where
    one was asked for; a head has the first in any case, which may only look."""
    if is_autoscaler_v2():
        return True
    told = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (told.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(
        not name.startswith("node_") for name in types
    )  # one that looks calls each by its id


def added(bundles: Sequence[Mapping[str, float]], *, deadline_s: float) -> bool:
    """Wait until the cluster has room for all bundles at the same time, for which its autoscaler is
    asked; whether it came. The room is free then."""
    group = placement_group([dict(bundle) for bundle in bundles if bundle])
    try:
        return came(group, deadline=time.monotonic() + deadline_s)
    finally:
        remove_placement_group(group)


def came(group: PlacementGroup, *, deadline: float) -> bool:
    """Wait for a group's place; whether it came."""
    while not group.wait(max(0.0, min(POLL_S, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
    return True


class Awaited:
    """Places for copies of one bundle which an autoscaler is asked for, and which are kept free
    until they are released. They end with the driver."""

    def __init__(self, bundle: Mapping[str, float]) -> None:
        self._bundle = dict(bundle)
        self._groups: list[PlacementGroup] = []

    def ask(self, number: int) -> None:
        """Ask for so many in all; nothing where no node can be added."""
        if number > len(self._groups) and autoscales():
            more = range(number - len(self._groups))
            self._groups += [placement_group([self._bundle]) for _ in more]

    def placed(self) -> int:
        """How many have come."""
        if not self._groups:
            return 0
        states = placement_group_table()
        return sum(states[group.id.hex()]["state"] == "CREATED" for group in self._groups)

    def release(self) -> None:
        """Ask for none any more, and leave the room to others."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()

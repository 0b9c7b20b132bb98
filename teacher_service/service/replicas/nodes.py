"""Nodes of a cluster: its head, and those that an autoscaler may add."""

import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import RpcError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

HEAD = "node:__internal_head__"  # what Ray lets the head declare
HEAD_SHARE = 0.0001  # the least that Ray takes; the head has one
ROLES = ("teacher", "student")  # of every run
ADDED_S = 900.0  # a node of a cloud may take ten minutes to come
STUCK_S = 30.0  # between an order for nodes and their first sign, several looks of an autoscaler
BY_ID = re.compile("node_[0-9a-f]{56}")  # what an autoscaler that only looks calls a node
POLL_S = 1.0
ANSWER_S = 10.0
NONE_TO_ADD = "adds no node for it: no node type has what it asks for, or all are at their maximum"


def of_the_head() -> dict[str, float]:
    """What an actor that needs nothing asks for to live on the head, which no autoscaler takes
    away; nothing where no node says that it is the head. It works where the head has no CPUs."""
    heads = [node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    return {HEAD: HEAD_SHARE} if heads else {}


def declares(role: str) -> bool:
    """Whether processes of a role ask for its resource: where a node has it, or may come with it,
    since others have another role's."""
    there = {name for node in ray.nodes() if node["Alive"] for name in node["Resources"]}
    return role in there or (not there.isdisjoint((*ROLES, "rollouts")) and autoscales())


class Look(NamedTuple):
    """One look of an autoscaler at its cluster."""

    number: float  # another at every look
    types: frozenset[str]  # of the nodes that are there
    stuck: bool  # groups wait for a place, and no node is on its way or will be tried again


def looked() -> Look | None:
    """The last look of the cluster's autoscaler, of either generation; None before the first, and
    where the head does not say."""
    if is_autoscaler_v2():
        raylet: Any = importlib.import_module("ray._raylet")  # no type stubs
        messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
        try:
            gcs = raylet.GcsClient(ray.get_runtime_context().gcs_address)
            told = gcs.get_cluster_status(timeout_s=ANSWER_S)
        except RpcError:
            return None
        return second_generation(messages.GetClusterStatusReply.FromString(told))
    return _first_generation(json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}"))


def _first_generation(told: Mapping) -> Look | None:
    if (report := told.get("autoscaler_report")) is None:
        return None
    tried = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    later = [name for name, found in tried.items() if not found["is_available"]]
    coming = report.get("pending_nodes") or report.get("pending_launches") or later
    asked = (told.get("load_metrics_report") or {}).get("pg_demand")
    types = frozenset(report.get("active_nodes") or {})
    return Look(told.get("time", 0.0), types, bool(asked) and not coming)


def second_generation(told: Any) -> Look:
    """A look as Ray's `GetClusterStatusReply` tells it."""
    state = told.autoscaling_state
    coming = (
        state.pending_instances or state.pending_instance_requests or state.failed_instance_requests
    )
    types = {node.ray_node_type_name for node in told.cluster_resource_state.node_states}
    return Look(
        state.last_seen_cluster_resource_state_version,
        frozenset(types - {""}),
        bool(state.infeasible_gang_resource_requests) and not coming,
    )


def autoscales() -> bool:
    """Whether an autoscaler may add nodes to the cluster. A head has one in any case, which may
    only look: it has no types of nodes, and calls each by its id or not at all."""
    look = looked()
    return look is not None and not all(BY_ID.fullmatch(name) for name in look.types)


class Outlook:
    """Whether an autoscaler may still bring nodes, as its looks tell while they are waited for."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._stuck_since: float | None = None
        self.hopeless = False

    def follow(self) -> None:
        """Take in the last look; `hopeless` once all those of STUCK_S are stuck."""
        look, at = looked(), time.monotonic()
        if look is None or look.number == self._last:
            return
        self._last = look.number
        if not look.stuck:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = at
        self.hopeless = self._stuck_since is not None and at - self._stuck_since >= STUCK_S


def added(bundles: Sequence[Mapping[str, float]], *, deadline_s: float) -> str | None:
    """Wait until the cluster has room for all bundles at the same time, for which its autoscaler is
    asked; why it did not come, None where it did. The room is free then."""
    group = placement_group([dict(bundle) for bundle in bundles if bundle])
    outlook = Outlook()
    try:
        if came(group, deadline=time.monotonic() + deadline_s, outlook=outlook):
            return None
    finally:
        remove_placement_group(group)
    return NONE_TO_ADD if outlook.hopeless else f"added no nodes for it within {deadline_s:g} s"


def came(group: PlacementGroup, *, deadline: float, outlook: Outlook | None = None) -> bool:
    """Wait for a group's place; whether it came, which an outlook may make hopeless."""
    while not group.wait(max(0.0, min(POLL_S, deadline - time.monotonic()))):
        if outlook is not None:
            outlook.follow()
        if time.monotonic() >= deadline or (outlook is not None and outlook.hopeless):
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

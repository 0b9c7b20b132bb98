"""Nodes of clusters that `ray start` makes, and what runs on them."""

import json
import socket
from typing import Any, NamedTuple

from tests.drills.commands import Command, Home, wait_until

TOKEN = {"RAY_AUTH_MODE": "token"}


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start_node(home: Home, *arguments: str, role: str = "", **variables: str) -> Command:
    """`ray start --block`, with the resource of one role or without any."""
    node = home.ray(
        "start",
        "--block",
        "--num-cpus=2",
        f"--resources={json.dumps({role: 4} if role else {})}",
        "--object-store-memory=200000000",
        "--disable-usage-stats",
        f"--dashboard-agent-listen-port={free_ports(1)[0]}",  # the default may be another head's
        *arguments,
        **variables,
    )
    wait_until(lambda: "Ray runtime started" in node.output, doing=node)
    return node


def listed(home: Home, dashboard: str, what: str, **variables: str) -> list[dict[str, Any]]:
    """Ray's own state of actors or placement groups, dead ones among them."""
    asking = home.ray(
        "list", what, f"--address={dashboard}", "--format=json", "--limit=1000",
        **variables,
    )  # fmt: skip
    assert asking.wait() == 0, asking.output
    if "No resource in the cluster" in asking.output:
        return []
    return json.loads(asking.output[asking.output.index("[") :])


def actors(home: Home, dashboard: str, **variables: str) -> dict[str, set[str]]:
    """The nodes of the living actors of each class."""
    nodes: dict[str, set[str]] = {}
    for actor in listed(home, dashboard, "actors", **variables):
        if actor["state"] == "ALIVE":
            nodes.setdefault(actor["class_name"], set()).add(actor["node_id"])
    return nodes


class Head(NamedTuple):
    """Where a head is reached."""

    address: str  # by nodes that join
    dashboard: str


def start_head(home: Home, *, role: str = "", **variables: str) -> Head:
    """`ray start --head` with two CPUs, and the resource of one role or without any."""
    port, dashboard_port, client_port = free_ports(3)
    start_node(
        home,
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
        role=role,
        **variables,
    )
    return Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}")

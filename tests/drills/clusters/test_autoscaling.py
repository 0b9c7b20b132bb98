"""A cluster whose autoscaler adds nodes for a run and takes the teacher's away again, as Ray's own
fake of a cloud does on one machine."""

import json
import sys
import time
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from tests.cluster.jobs import write_job
from tests.drills.clusters.test_elastic import QUICK, assert_learnt_alike, job_of, lines
from tests.drills.commands import Home, reached, wait_until
from tests.drills.nodes import actors, free_ports, listed, start_head, start_node

pytestmark = pytest.mark.drill

HEAD = "f" * 51 + "0" * 5  # the id that Ray's fake gives to the head
OPEN = {"RAY_AUTH_MODE": "disabled"}
# The first generation of Ray's autoscaler: the fake of the second is not whole in its wheel.
FAKE = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
    *("rsync_exclude", "rsync_filter"),
)


def start_autoscaling_head(
    home: Home, *, role: str = "student", comes: str = "teacher"
) -> tuple[str, str]:
    """A head of one role that may have two nodes of the other, each until it has been idle for six
    seconds; returns its address and that of its dashboard."""
    port, dashboard_port, client_port = free_ports(3)
    address = f"{get_node_ip_address()}:{port}"
    head = {"resources": {"CPU": 2, role: 4}, "node_config": {}, "max_workers": 0}
    other = {
        "resources": {"CPU": 1, comes: 4, "object_store_memory": 10**8},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, comes: other},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in COMMANDS},
        "file_mounts_sync_continuously": False,
    }
    file = home.folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    start_node(
        home,
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
        f"--autoscaling-config={file}",
        role=role,
        **OPEN,
        **FAKE,
    )
    return address, f"http://127.0.0.1:{dashboard_port}"


def alive(home: Home, dashboard: str) -> int:
    """How many nodes there are."""
    return sum(n["state"] == "ALIVE" for n in listed(home, dashboard, "nodes", **OPEN))


def test_nodes_come_for_a_run_and_the_teachers_go_after_it(home: Home, tiny_pair, tmp_path: Path):
    address, dashboard = start_autoscaling_head(home)
    teachers = {"tiny": {"model": str(tiny_pair.teacher), "cpus": 1, "replicas": {"max": 2}}}
    job = write_job(tmp_path, tiny_pair, steps=60, teachers=teachers)
    command = home.start("run", str(job), "--address", address, **OPEN)
    wait_until(reached(tmp_path / "runs" / "job", 5), doing=command)
    assert "no room for the teacher's replicas" in command.output
    assert "its autoscaler is asked for nodes" in command.output
    nodes = actors(home, dashboard, **OPEN)
    teacher = nodes.pop("TeacherReplica")
    assert {"TeacherRegistry", "ControllerActor", "RayTrainWorker"} <= set(nodes)
    assert HEAD not in teacher
    assert {name: on for name, on in nodes.items() if on != {HEAD}} == {}
    assert command.wait() == 0, command.output
    wait_until(lambda: alive(home, dashboard) == 1)


def test_elastic_workers_grow_onto_nodes_that_come_for_them_and_go_after_them(
    home: Home, tiny_pair, tmp_path: Path
):
    address, dashboard = start_autoscaling_head(home, role="teacher", comes="student")
    job = job_of(tmp_path, tiny_pair, steps=150, checkpoints={"every": 10})
    asked = ("run", str(job), "student.workers={min: 1, max: 2}", "--address", address)
    command = home.execute(sys.executable, "-c", QUICK, *asked, **OPEN)
    run = tmp_path / "runs" / "job"
    wait_until(reached(run, 5), doing=command)
    assert "no room for the student's workers" in command.output
    assert "its autoscaler is asked for nodes" in command.output
    assert "student: 1 worker, from 1 to 2" in command.output
    wait_until(lambda: "student: 1 -> 2 workers" in command.output, doing=command)
    assert len(actors(home, dashboard, **OPEN)["RayTrainWorker"] - {HEAD}) == 2
    assert command.wait() == 0, command.output
    assert [line.workers for line in lines(run)][-1] == 2
    wait_until(lambda: alive(home, dashboard) == 1)
    home.run("run", str(job), "name=whole", "student.workers=1", "--address", address, **OPEN)
    assert_learnt_alike(run, tmp_path / "runs" / "whole")


def test_what_no_type_of_node_has_is_refused_while_others_would_come(home, tiny_pair, tmp_path):
    address, _ = start_autoscaling_head(home)
    teachers = {"tiny": {"model": str(tiny_pair.teacher), "cpus": 2}}
    job = write_job(tmp_path, tiny_pair, teachers=teachers)
    started = time.monotonic()
    said = home.run("run", str(job), "--address", address, expecting=2, **OPEN)
    assert "its autoscaler adds no node for it: no node type has what it asks for" in said
    assert time.monotonic() - started < 180  # of 900


def test_a_head_of_the_second_generation_that_only_looks_adds_no_nodes(home, tiny_pair, tmp_path):
    address, _ = start_head(home, role="student", RAY_enable_autoscaler_v2="1", **OPEN)
    teachers = {"tiny": {"model": str(tiny_pair.teacher), "cpus": 3}}
    job = write_job(tmp_path, tiny_pair, teachers=teachers)
    said = home.run("run", str(job), "--address", address, expecting=2, **OPEN)
    assert "no room for the teacher's replicas" in said
    assert "autoscaler" not in said

"""Clusters that somebody else started: jobs submitted to them, roles on different nodes."""

import json

import pytest

from tests.drills.commands import Command, Home, reached, titled, wait_until
from tests.drills.evidence import assert_same, failures
from tests.drills.nodes import TOKEN, actors, listed, start_head, start_node

pytestmark = pytest.mark.drill

OPEN = {"RAY_AUTH_MODE": "disabled"}


def submit(home: Home, dashboard: str, *command: str, **variables: str) -> Command:
    """`ray job submit`, again while the head is still waiting for its agents."""
    submitted = home.ray(
        "job", "submit", f"--address={dashboard}", "--working-dir=.", "--", *command,
        **variables,
    )  # fmt: skip
    wait_until(lambda: "submitted successfully" in submitted.output or not submitted.running)
    if not submitted.running and "No available agent" in submitted.output:
        return submit(home, dashboard, *command, **variables)
    return submitted


CONNECTING = """
import os
import ray
from cluster.session.session import connected

copy = os.path.dirname(os.path.abspath(__file__))
with connected():
    assert os.listdir(".") == ["connecting.py"], "the copy was taken away"
    ray.get(ray.remote(resources={"student": 1})(lambda: None).remote())
    assert os.path.samefile(".", copy), "it was unpacked again later"
    print("in one copy")
"""


def test_nodes_of_one_machine_have_unpacked_a_jobs_copy_once_it_has_joined(home):
    address, dashboard = start_head(home, role="teacher", **OPEN)
    start_node(home, f"--address={address}", role="student", **OPEN)
    home.working = home.folder / "own"
    home.working.mkdir()
    (home.working / "connecting.py").write_text(CONNECTING)
    submitted = submit(home, dashboard, "python", "connecting.py", **OPEN)
    assert submitted.wait() == 0, submitted.output
    assert "in one copy" in submitted.output


def test_a_submitted_job_has_teacher_and_student_on_different_nodes(home, job, tmp_path):
    token = home.ray("get-auth-token", "--generate")
    assert token.wait() == 0, token.output
    address, dashboard = start_head(home, role="teacher", **TOKEN)
    start_node(home, f"--address={address}", role="student", **TOKEN)
    submitted = submit(
        home, dashboard, "tutelage", "run", str(job.config), f"paths.runs={tmp_path}", **TOKEN
    )
    run = tmp_path / "job"
    wait_until(reached(run, 1), doing=submitted)
    assert titled(home.processes(), "RayTrainWorker")
    nodes = actors(home, dashboard, **TOKEN)
    (teacher,) = nodes["TeacherReplica"]
    (student,) = nodes["RayTrainWorker"]
    assert teacher != student
    assert submitted.wait() == 0, submitted.output
    assert "step 60/60" in submitted.output
    assert_same(run, job.reference)

    status = ("status", "--runs", str(tmp_path), "--address", address)
    assert "asks for a token" in home.run(*status, HOME=str(tmp_path), expecting=2)
    said = home.run(*status)
    assert "Unauthenticated" not in said
    assert "2 nodes" in said
    assert "job: finished" in said


def test_a_teachers_node_that_is_lost_is_one_line_and_restarts_no_student(home, job, tmp_path):
    address, _ = start_head(home, role="student", **OPEN)
    leaves = start_node(home, f"--address={address}", role="teacher", **OPEN)
    runs = f"paths.runs={tmp_path}"
    command = home.start("run", str(job.config), runs, "--address", address, **OPEN)
    wait_until(reached(tmp_path / "job", 14), doing=command)
    leaves.kill_everything()
    start_node(home, f"--address={address}", role="teacher", **OPEN)
    assert command.wait() == 0, command.output
    said = command.output.splitlines()
    assert len([line for line in said if "the cluster lost the node" in line]) == 1
    assert "raylet" not in command.output
    assert failures(tmp_path / "job")["student_restarts"] == 0
    assert_same(tmp_path / "job", job.reference)


def test_two_runs_on_one_cluster_share_nothing_but_what_they_should(home, job, tmp_path):
    address, dashboard = start_head(home, **OPEN)
    runs, names = f"paths.runs={tmp_path}", ("one", "two")
    commands = {
        name: home.start("run", str(job.config), f"name={name}", runs, "--address", address, **OPEN)
        for name in names
    }
    for name, command in commands.items():
        wait_until(reached(tmp_path / name, 1), doing=command)
    elsewhere = {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}  # where no cluster is
    told = json.loads(home.run("status", str(tmp_path / "one"), "--json", **elsewhere))
    assert told["state"] == "at work"
    assert [replica["state"] for replica in told["replicas"]] == ["alive"] * 2
    alive = [a for a in listed(home, dashboard, "actors", **OPEN) if a["state"] == "ALIVE"]
    for kind, number in (("TeacherRegistry", 2), ("ControllerActor", 2), ("TeacherReplica", 4)):
        named = {(a["name"], a["ray_namespace"]) for a in alive if a["class_name"] == kind}
        assert len(named) == number
    for name, command in commands.items():
        assert command.wait() == 0, command.output
        assert_same(tmp_path / name, job.reference)

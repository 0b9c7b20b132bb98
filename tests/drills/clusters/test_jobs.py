"""A user's day with a cluster: jobs submitted from a folder of one's own, left, found, stopped."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from cluster.report.stages import SENTENCES
from tests.cluster.jobs import write_job
from tests.drills.commands import NOT_OURS, Command, Home, heard, reached, steps_done, wait_until
from tests.drills.nodes import TOKEN, actors, listed, start_head
from tests.tiny import Pair

pytestmark = pytest.mark.drill

FOREVER = "steps=1000000"
FIRST_LINE_S = 5.0  # of the job itself, after its submission; longer where cores have a queue


@pytest.fixture
def project(home: Home, tmp_path: Path, tiny_pair: Pair) -> Path:
    """A folder with text, models and a config that names them by relative paths; `home` works
    there."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_pair.teacher, folder / "models" / "teacher")
    shutil.copytree(tiny_pair.student, folder / "models" / "student")
    path = write_job(folder, tiny_pair, steps=3, log_every=1)
    job = yaml.safe_load(path.read_text())
    del job["paths"]
    job["teachers"]["tiny"]["model"] = "models/teacher"
    job["student"]["model"] = "models/student"
    path.write_text(yaml.safe_dump(job))
    home.working = folder
    return folder


def id_in(said: str) -> str:
    """The id of the job that was submitted."""
    (found,) = re.findall(r"^Job +(\S+)$", said, re.M)
    return found


def make_token(home: Home) -> None:
    made = home.ray("get-auth-token", "--generate")
    assert made.wait() == 0, made.output


@pytest.mark.parametrize("token", ["none", "asked for", "found by Ray itself"])
def test_a_folder_of_ones_own_is_submitted_twice(home, project, token):
    if token != "none":
        make_token(home)
    dashboard = start_head(home, **(TOKEN if token == "asked for" else {})).dashboard
    address = f"--address={dashboard}"
    submitted = home.start("submit", "job.yaml", address)
    wait_until(lambda: "Dashboard  " in submitted.output, doing=submitted)
    began, busy = time.monotonic(), max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    wait_until(lambda: f": {SENTENCES['start']}" in submitted.output, doing=submitted)
    assert time.monotonic() - began < FIRST_LINE_S * busy
    assert submitted.wait() == 0, submitted.output
    said = submitted.output
    job = id_in(said)
    assert said.splitlines()[0] == f"Dashboard  {dashboard}/#/jobs/{job}"
    assert re.search(rf"^Package +\d+ files, [\d.]+ [kM]B of {project}$", said, re.M)
    assert "step 3/3" in said
    assert "Warning" not in said
    run = home.folder / "runs" / "job"
    assert re.fullmatch(rf"Fetch it  scp -r \S+:{run}/export \.", said.splitlines()[-1])
    assert (run / "export" / "model.safetensors").exists()

    assert "job is finished" in home.run("submit", "job.yaml", address)
    listed = home.run("jobs", "ls", address).splitlines()
    assert [line.split()[1] for line in listed] == ["status", "succeeded", "succeeded"]
    assert listed[1].startswith(job)
    assert listed[1].endswith("teacher -> student, 3 steps")
    assert "step 3/3" in home.run("jobs", "logs", job, address)
    assert f"{job} has ended before" in home.run("jobs", "stop", job, address)
    assert f"there is no job {job}x" in home.run("jobs", "stop", f"{job}x", address, expecting=2)
    if token != "none":
        stranger = {"HOME": str(project)}
        assert "asks for a token" in home.run("jobs", "ls", address, expecting=2, **stranger)
        wrong = {"RAY_AUTH_TOKEN": "0" * 64}
        assert "refuses this token" in home.run("jobs", "ls", address, expecting=2, **wrong)


def test_a_job_is_left_found_stopped_and_gone_on_with(home, project):
    dashboard = start_head(home).dashboard
    address = f"--address={dashboard}"
    run = home.folder / "runs" / "job"
    submitted = home.start("submit", "job.yaml", FOREVER, address)
    wait_until(reached(run, 3), doing=submitted)
    job = id_in(submitted.output)
    submitted.process.send_signal(signal.SIGSTOP)  # as a laptop that sleeps
    time.sleep(20)
    wait_until(reached(run, steps_done(run) + 3))
    submitted.process.send_signal(signal.SIGCONT)
    missed = steps_done(run)
    wait_until(lambda: f"step {missed}/" in submitted.output, doing=submitted)
    submitted.process.send_signal(signal.SIGINT)
    assert submitted.wait() == 1, submitted.output
    said = submitted.output.splitlines()[-1]
    assert f"tutelage jobs logs {job} {address.replace('=', ' ')} --follow" in said
    assert f"tutelage jobs stop {job} {address.replace('=', ' ')}" in said
    wait_until(reached(run, steps_done(run) + 3))

    assert f"{job} is stopped" in home.run("jobs", "stop", job, address)
    assert left(home, dashboard) == {}
    groups = listed(home, dashboard, "placement-groups")
    assert {group["state"] for group in groups} == {"REMOVED"}
    log = home.run("jobs", "logs", job, address)
    assert "which is saved; the same command continues" in log
    step = steps_done(run)
    (project / "notes.txt").write_text("Another folder now.")
    said = home.run("submit", "job.yaml", FOREVER, address, "--detach")
    assert "The job goes on without this command" in said
    following = home.start("jobs", "logs", id_in(said), address, "--follow")
    wait_until(reached(run, step + 3), doing=following)
    wait_until(lambda: f"from step {step}" in following.output, doing=following)
    home.run("jobs", "stop", id_in(said), address)
    assert following.wait() == 1
    assert "was stopped" in following.output

    step = steps_done(run)
    submitted = home.start("submit", "job.yaml", FOREVER, address)
    wait_until(reached(run, step + 2), doing=submitted)
    submitted.kill()
    wait_until(reached(run, steps_done(run) + 3))
    home.run("jobs", "stop", id_in(submitted.output), address)
    assert left(home, dashboard) == {}


def left(home: Home, dashboard: str) -> dict[str, set[str]]:
    """Living actors, by class, once Ray has ended those of a job that is gone; but the one in which
    Ray keeps, for its dashboard, what Train has run on a cluster."""

    def living() -> dict[str, set[str]]:
        found = actors(home, dashboard)
        return {name: nodes for name, nodes in found.items() if name != "TrainStateActor"}

    deadline = time.monotonic() + 30
    while (found := living()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def test_a_head_without_tutelage_is_named(home, project):
    dashboard = start_head(home, PATH="/usr/bin:/bin").dashboard
    said = home.run("submit", "job.yaml", f"--address={dashboard}", expecting=1)
    assert f"JobError: the head of {dashboard} has no program `tutelage`; install" in said


def submit_plainly(home: Home, dashboard: str, *command: str) -> Command:
    """`ray job submit`, as Ray's own documentation has it."""
    return home.ray(
        "job", "submit", f"--address={dashboard}", "--working-dir=.", "--", *command
    )  # fmt: skip


def test_ray_job_submit_does_as_well(home, project):
    dashboard = start_head(home).dashboard
    address = f"--address={dashboard}"
    said = home.run("submit", "job.yaml", "student.model=/absent", address, expecting=2)
    assert "ConfigError: student.model is '/absent'" in said
    assert "failed with exit code 2; its log says why" in said.splitlines()[-1]
    submitted = submit_plainly(home, dashboard, "tutelage", "run", "job.yaml")
    assert submitted.wait() == 0, submitted.output
    assert (home.folder / "runs" / "job" / "export" / "model.safetensors").exists()
    assert f":{home.folder}/runs/job/export ." in submitted.output


def ended_by(number: int, command: Command) -> str:
    """What a command says last after a signal."""
    command.process.send_signal(number)
    assert command.wait(60) == 1, command.output
    assert not NOT_OURS.search(command.output), command.output
    return command.output.strip().splitlines()[-1]


def heard_before_it_is_sent(home: Home, address: str) -> Command:
    """A submission that has said what it takes along, and no job yet."""
    submitted = home.start("submit", "job.yaml", FOREVER, address)
    wait_until(lambda: "Package  " in submitted.output, doing=submitted)
    return submitted


def test_a_signal_leaves_a_job_alone_and_says_so(home, project):
    dashboard = start_head(home).dashboard
    address = f"--address={dashboard}"
    early = ended_by(signal.SIGTERM, heard_before_it_is_sent(home, address))
    sent = re.findall(r"^job-\S+", home.run("jobs", "ls", address), re.M)
    kept = "whether job-" in early or "The job goes on" in early
    assert kept or (early == "Interrupted; the same command starts again." and not sent)
    for job in sent:
        home.run("jobs", "stop", job, address)

    submitted = home.start("submit", "job.yaml", FOREVER, address)
    wait_until(reached(home.folder / "runs" / "job", 2), doing=submitted)
    job = id_in(submitted.output)
    goes_on = "The job goes on without this command. Follow it: tutelage jobs logs"
    assert ended_by(signal.SIGTERM, submitted).startswith(f"{goes_on} {job}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        following = home.start("jobs", "logs", job, address, "--follow")
        wait_until(lambda: "step 2/" in following.output, doing=following)  # noqa: B023
        assert ended_by(number, following).startswith(f"{goes_on} {job}")
    run = home.folder / "runs" / "job"
    wait_until(reached(run, steps_done(run) + 2))

    stopping = home.start("jobs", "stop", job, address)
    wait_until(lambda: "is saved first" in stopping.output, doing=stopping)
    said = ended_by(signal.SIGTERM, stopping)
    assert f"jobs ls {address.replace('=', ' ')}` shows {job}" in said
    home.run("jobs", "stop", job, address)
    assert f"{job}  stopped" in home.run("jobs", "ls", address)
    assert "which is saved; the same command continues" in home.run("jobs", "logs", job, address)
    assert left(home, dashboard) == {}


def test_an_examination_of_a_cluster_is_interrupted(home):
    head = start_head(home)
    for wait_s in (0.0, 1.5, 3.0):
        examining = home.start("doctor", "--address", head.address)
        wait_until(lambda: heard(examining), doing=examining)  # noqa: B023
        time.sleep(wait_s)
        if examining.running:
            said = ended_by(signal.SIGTERM, examining)
            assert said == "Interrupted; the same command starts again."
    assert left(home, head.dashboard) == {}
    home.run("doctor", "--address", head.address)

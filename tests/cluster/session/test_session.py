"""Joining and starting clusters: the second time works like the first, dead ones are passed by."""

import importlib.util
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from cluster.session import ray_head
from cluster.session.session import (
    JOB_ENVIRONMENT,
    PASSED_ON,
    _init,
    find_address,
    prepare_environment,
    runtime_env,
)
from shared.errors import PlacementError
from tests.telling import telling

ROOT = Path(__file__).resolve().parents[3]

JOIN = """
import os, sys
import psutil
from cluster.session.session import JOB_ENVIRONMENT, connected
os.environ["OMP_NUM_THREADS"] = "7"
with connected(outlives=sys.argv[1] == "outlives"):
    import ray
    assert ray.cluster_resources()["student"] > 0
    assert ray.cluster_resources()["teacher"] > 0
    context = ray.get_runtime_context()
    assert not context.runtime_env, "a process with an environment of its own is started twice"
    environment = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert JOB_ENVIRONMENT.items() <= environment.items()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    print(context.gcs_address)
assert sys.argv[1] == "outlives" or not psutil.Process().children(recursive=True)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def join(how: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"}
    command = [sys.executable, "-c", JOIN, how]
    outcome = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.strip()


def remember(**changes: object) -> None:
    process = psutil.Process()
    head = {"address": "127.0.0.1:1", "pid": process.pid, "started": process.create_time()}
    ray_head.state_file().parent.mkdir(parents=True, exist_ok=True)
    ray_head.state_file().write_text(json.dumps(head | changes))


@pytest.mark.parametrize("variable", ["HF_HOME", "OMP_NUM_THREADS"])
def test_what_a_head_does_not_hand_down_is_given_to_every_process(variable, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    inherited = JOB_ENVIRONMENT | {n: os.environ[n] for n in PASSED_ON if n in os.environ}
    assert runtime_env(inherited) == {}
    changed = inherited | {variable: "other"}
    assert runtime_env(changed) == {"env_vars": {variable: inherited[variable]}}
    assert runtime_env({})["env_vars"] == inherited


def test_a_head_of_somebody_else_hands_down_nothing_that_is_known():
    remember()
    assert ray_head.environment("127.0.0.1:1")["PATH"]
    assert ray_head.environment("127.0.0.1:2") == {}


def test_nothing_running_is_found_nowhere():
    assert find_address() is None


def test_a_head_whose_process_is_gone_is_forgotten():
    remember(pid=2**22 + 1)
    assert find_address() is None
    assert not ray_head.state_file().exists()


def test_a_process_that_got_the_id_of_a_dead_head_is_not_taken_for_it():
    remember(started=0.0)
    assert ray_head.remembered() is None


def test_a_head_that_does_not_answer_is_passed_over():
    remember()
    assert find_address() is None


def test_a_torn_state_file_is_no_head():
    remember()
    ray_head.state_file().write_text('{"address": ')
    assert find_address() is None


def test_an_address_file_of_a_dead_cluster_is_passed_over(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    assert find_address() is None


def test_a_cluster_that_someone_else_started_here_is_joined(tmp_path):
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert find_address() == address
        assert find_address("local") is None


def test_an_address_where_nothing_answers_is_refused():
    with pytest.raises(PlacementError, match=r"no Ray cluster answers at 127.0.0.1:1;"):
        find_address("127.0.0.1:1")


def test_a_cluster_of_another_version_is_refused_with_both(monkeypatch):
    """In Ray's own words, which are many lines, on what the head would have told it."""
    from ray._private.utils import check_version_info

    told = {"ray_version": "2.9.3", "python_version": "3.10.12"}
    monkeypatch.setattr(ray, "init", lambda **_: check_version_info(told, "node 127.0.0.1"))
    with pytest.raises(PlacementError) as refused:
        _init("head:6379", {})
    assert str(refused.value) == (
        "the cluster at head:6379 runs Ray 2.9.3 and Python 3.10.12, but Ray "
        f"{ray.__version__} and Python {platform.python_version()} are installed here; install the "
        "same versions on both"
    )


def test_the_token_is_made_once_and_readable_by_its_owner_alone():
    first, second = (ray_head.token_environment() for _ in range(2))
    assert first == second
    path = Path(first["RAY_AUTH_TOKEN_PATH"])
    assert len(path.read_text()) == 64
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.drill
def test_a_head_outlives_its_command_serves_the_next_and_is_stopped():
    assert join("private") != ""
    first = join("outlives")
    try:
        assert ray_head.address() == first
        assert join("private") == first  # a command that would start its own joins it
        assert join("outlives") == first
    finally:
        assert ray_head.stop()
    assert not ray_head.stop()
    assert not ray_head.orphans()
    assert join("private") != first


@pytest.mark.drill
def test_what_a_killed_head_leaves_is_reaped_and_a_new_one_starts():
    join("outlives")
    head = ray_head.remembered()
    assert head is not None
    psutil.Process(head.pid).kill()
    psutil.Process(head.pid).wait(30)
    ray_head.reap()
    assert not ray_head.orphans()
    second = join("outlives")
    assert second != head.address
    assert ray_head.stop()


WAITS = """
from cluster.session.interrupts import handling, interrupted_as
from cluster.session.session import connected
with handling(), interrupted_as(lambda: "it goes on from step 3"), connected("local"):
    import ray
    from ray._private import worker
    worker._global_node.all_processes["gcs_server"][0].process.kill()
    ray.get(ray.remote(lambda: 1).remote())
"""


STUCK = """
import threading, time
from cluster.session.interrupts import handling, interrupted_as
from cluster.session.session import IN_RAY, connected
with handling(), interrupted_as(lambda: "it goes on from step 3"), connected("local"):
    import ray
    def wait():
        while True:
            ray.wait([ray.remote(lambda: time.sleep(100)).remote()], timeout=0.01)
    threading.Thread(target=wait, daemon=True, name=IN_RAY).start()
    time.sleep(1)
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("script", telling([WAITS, STUCK], WAITS))
def test_a_command_that_ray_would_abort_ends_in_seconds_with_its_sentence(script):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"}
    command = [sys.executable, "-c", script]
    outcome = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=50
    )
    assert outcome.returncode == 1, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "it goes on from step 3"


def test_deepspeed_says_everything_but_that_there_is_no_gpu():
    prepare_environment()
    log = logging.getLogger("DeepSpeed")

    def shown(said: str) -> bool:
        return bool(log.filter(log.makeRecord(log.name, logging.WARNING, "", 0, said, (), None)))

    assert shown("no compiler was found")
    source = Path(importlib.util.find_spec("deepspeed").origin).parent  # type: ignore[union-attr,arg-type]
    line = next(
        line
        for line in (source / "accelerator" / "real_accelerator.py").read_text().splitlines()
        if "Setting accelerator to CPU" in line
    )
    assert not shown(line.strip().lstrip('"'))

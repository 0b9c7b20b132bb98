"""A Ray head on this machine that outlives the command which started it.

It is remembered in one file; it is one process group, so stopping it touches no other cluster.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import xxhash

from cluster.session.interrupts import hearing
from shared.errors import PlacementError
from shared.run.run_dir import write_atomically

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 10.0
SHOWN_CHARS = 200  # of what a head said last
# Enough for any number of processes: on a machine of our own the roles share every core.
ROLE_RESOURCES: dict[str, float] = {"teacher": 1000, "student": 1000}


@dataclass(frozen=True, slots=True)
class RayHead:
    """The process that keeps the head alive."""

    address: str
    pid: int
    started: float  # the process's creation time, since ids are reused


def state_file() -> Path:
    """Where the head of this user on this machine is remembered."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "tutelage" / "cluster.json"


def remembered() -> RayHead | None:
    """The head, if it is still alive; what is left of a dead one is forgotten."""
    try:
        head = RayHead(**json.loads(state_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if _process(head) is None:
        state_file().unlink(missing_ok=True)
        return None
    return head


def is_gone(since: float) -> bool:
    """Whether no head is alive; what is left of one that was at `since`, in seconds of `time`, is
    ended then. What is younger may be of one that is coming up."""
    gone = remembered() is None
    if gone:
        left = orphans()
        old = [process for process in left if process.create_time() < since]
        _end(old)
        if old == left:
            shutil.rmtree(_temp_dir(), ignore_errors=True)
    return gone


def address() -> str | None:
    """HOST:PORT of the head that is alive."""
    head = remembered()
    return head.address if head else None


def token_environment() -> dict[str, str]:
    """Variables that turn token authentication on with our own token, made once."""
    path = state_file().with_name("auth_token")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def has_users_token() -> bool:
    """Whether Ray finds a token of the user's own."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or Path("~/.ray/auth_token").expanduser().exists()


def object_store_bytes() -> int:
    """What the answers under way need, within what the machine's shared memory holds."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 2**30
    return int(min(4 * 2**30, max(128 * 2**20, 0.3 * free)))


def environment(address: str) -> dict[str, str]:
    """Variables that processes inherit from the head at an address, none where it is not ours."""
    head = remembered()
    process = _process(head) if head and head.address == address else None
    try:
        return process.environ() if process else {}
    except psutil.Error:
        return {}


def start(variables: Mapping[str, str]) -> str:
    """Start a head whose processes inherit `variables`, and return its address. Raises
    PlacementError when it does not come up."""
    reap()
    environment = {**os.environ, **variables, **token_environment()}
    port = _free_port()
    state_file().parent.mkdir(parents=True, exist_ok=True)
    log = state_file().with_name("cluster.log")
    command = _ray(
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--port={port}",
        "--include-dashboard=false",
        # Its default port is left to a head that takes jobs.
        f"--dashboard-agent-listen-port={_free_port()}",
        f"--temp-dir={_temp_dir()}",
        f"--object-store-memory={object_store_bytes()}",
        f"--resources={json.dumps(ROLE_RESOURCES)}",
    )
    with log.open("w") as output, hearing():
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found = _wait_until_up(process, port, log)
        head = RayHead(found, process.pid, psutil.Process(process.pid).create_time())
        write_atomically(state_file(), json.dumps(asdict(head)) + "\n")
    except BaseException:  # also a signal
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reap()
        raise
    return found


def stop() -> bool:
    """Stop the head that `start` left running, and everything in it; False if there is none."""
    head = remembered()
    process = _process(head) if head else None
    if process is None:
        return False
    family = process.children(recursive=True)
    process.terminate()  # it ends its children in order
    _, left = psutil.wait_procs([process, *family], timeout=STOP_DEADLINE_S)
    for member in left:
        member.kill()
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)
    state_file().unlink(missing_ok=True)
    return True


def discard() -> None:
    """End the head at once, whatever is in it, and remove what it leaves."""
    if (head := remembered()) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
    state_file().unlink(missing_ok=True)
    reap()


def orphans() -> list[psutil.Process]:
    """Processes of heads of ours whose keeper is dead."""
    head = remembered()
    keeper = _process(head) if head else None
    kept = {keeper.pid, *(p.pid for p in keeper.children(recursive=True))} if keeper else set()
    marked = [p for p in psutil.process_iter(["cmdline"]) if _is_ours(p)]
    return [process for process in marked if process.pid not in kept]


def reap() -> int:
    """End what dead heads left behind, processes and files; returns the number of processes."""
    left = orphans()
    _end(left)
    if remembered() is None:
        shutil.rmtree(_temp_dir(), ignore_errors=True)
    return len(left)


def _end(left: list[psutil.Process]) -> None:
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)


def _is_ours(process: psutil.Process) -> bool:
    command = process.info["cmdline"] or []
    return process.pid != os.getpid() and any(f"{_temp_dir()}/" in part for part in command)


def _process(head: RayHead) -> psutil.Process | None:
    try:
        process = psutil.Process(head.pid)
        alive = abs(process.create_time() - head.started) < 2
        return process if alive and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> str:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        # Printed once every process of the head is up; the address in it is the one to join.
        text = log.read_text(errors="replace")
        if "Ray runtime started" in text:
            return f"{_own_host(text, port)}:{port}"
        time.sleep(0.2)
    reason = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise PlacementError(
        f"a local Ray cluster did not start: {reason[:SHOWN_CHARS].rstrip('.')}; all it said is in "
        f"{log}; the machine may be busy: run the same command again"
    )


def _own_host(text: str, port: int) -> str:
    """The address Ray chose for this node, from its own hint to further nodes."""
    marker = f":{port}'"
    before, found, _ = text.partition(marker)
    return before.rpartition("'")[2] if found else "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _temp_dir() -> Path:
    """Short, since socket paths are limited; apart from every other cluster of this machine."""
    place = xxhash.xxh32_hexdigest(str(state_file()).encode())
    return Path(tempfile.gettempdir()) / f"tutelage-{os.getuid()}-{place}"


def _ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]

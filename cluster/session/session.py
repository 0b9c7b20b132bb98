"""Which Ray cluster a command works on: the named one, a local one, or one of its own.

Token authentication is on for every cluster started here and for its clients, with a token of our
own: Ray's defaults differ between starting and joining once a token exists in its default place.
"""

import importlib
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.session import ray_head
from cluster.session.interrupts import end_at_once, handled, kept
from cluster.session.job_copy import current_copy, settled
from shared.errors import PlacementError

# Read by Ray and torch when they are imported, so they are set before. Threads spin
# only briefly while they wait: long spinning stalls a machine whose cores are shared.
DRIVER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the connection would start a cluster
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would log for this process
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for what nobody here asks it
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_allow_out_of_band_object_ref_serialization": "0",
}

# Set in every process of the job. Several processes share the cores of a small machine, so each
# computes with one thread unless its role asks for more CPUs. Processes inherit them from a head of
# our own: one that a head must give an environment to is started twice.
JOB_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_allow_out_of_band_object_ref_serialization": "0",
}
HEAD = ("gcs_server", "raylet")  # as Ray calls the processes without which nothing works
HEAD_POLL_S = 0.5
END_S = 5.0
IN_RAY = "in-ray"  # name of threads that wait for Ray
# Ray starts a worker for each core ahead. A run takes the first few; more would be idle.
FEW_CORES = 8
NONE_AHEAD = {"RAY_prestart_worker_first_driver": "0"}
# Of a head, they serve nobody in a private one: an autoscaler where nothing scales, a reader of
# logs where none is printed, and a dashboard without its pages.
NEEDLESS = ("start_monitor", "start_log_monitor", "start_api_server")
PASSED_ON = (
    *("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "DS_ACCELERATOR"),
    # Settings of trackers; keys and passwords would stand in Ray's job pages.
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("TRACKIO_PROJECT", "TRACKIO_DIR", "TRACKIO_SPACE_ID"),
)


def prepare_environment() -> None:
    """Settings of Ray for this process; a value the user set stays."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not where there is no GPU, which the user knows."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


@contextmanager
def connected(address: str | None = None, *, outlives: bool = False) -> Iterator[None]:
    """Be a driver of a cluster for the length of a `with`.

    Joins `address`, else RAY_ADDRESS, else a cluster running on this machine; else starts one:
    private, ending with this process, or with `outlives` one that stays, unless something fails
    inside, until `tutelage teacher down --all`. `address="local"` always starts a private one.
    Raises PlacementError where the address does not answer.
    """
    prepare_environment()
    if is_connected():
        yield  # the caller's own connection, as in a test or a notebook
        return
    target = find_address(address)
    staying = target is None and outlives
    if staying:
        target = ray_head.start(JOB_ENVIRONMENT)
    try:
        with _joined(target) if target else _private():
            yield
        staying = False
    except KeyboardInterrupt:
        if any(thread.name == IN_RAY for thread in threading.enumerate()):
            end_at_once()  # Ray would abort under a thread that still waits for it
        raise
    finally:
        try:
            _leave() if target else _end_private()
        finally:  # also where a second signal ends the first of it
            if staying:
                ray_head.discard()


@contextmanager
def attached(address: str | None = None) -> Iterator[None]:
    """Like `connected`, but never starts a cluster. Raises PlacementError where there is none."""
    if not is_connected() and find_address(address) is None:
        raise PlacementError(
            "no cluster is running here; `tutelage teacher up CONFIG` starts one, "
            "--address HOST:PORT joins one"
        )
    with connected(address):
        yield


@contextmanager
def joined(address: str | None = None) -> Iterator[None]:
    """Like `connected` where a cluster is there already; where one is still to be started, nothing.
    For what is checked before any work. Raises PlacementError where the address does not answer."""
    with connected(address) if find_address(address) is not None else nullcontext():
        yield


def find_address(address: str | None = None) -> str | None:
    """Where to join, None for nowhere; what is left of dead clusters is passed over."""
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked == "local":
        return None
    if asked and asked != "auto":
        if not asked.startswith("ray://") and not answers(asked):
            raise PlacementError(
                f"no Ray cluster answers at {asked}; check --address or RAY_ADDRESS"
            )
        return asked
    candidates = (ray_head.address(), _address_of_ray_start())
    return next((found for found in candidates if found and answers(found)), None)


def answers(address: str, *, timeout_s: float = 3.0) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False


def _address_of_ray_start() -> str | None:
    """What the last `ray start --head` of this machine wrote down."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return file.read_text().strip() if file.exists() else None


def runtime_env(inherited: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What processes of the job need and do not inherit."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    needed = JOB_ENVIRONMENT | passed
    missing = {name: value for name, value in needed.items() if inherited.get(name) != value}
    return {"env_vars": missing} if missing else {}


@contextmanager
def with_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for what is started in a `with`."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def not_started(error: Exception) -> str:
    """The sentence for a cluster that Ray could not start on this machine."""
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0].partition(". ")[0]
    return (
        f"Ray did not start a cluster on this machine: {reason.rstrip('.')}; the machine may be "
        "busy, or short of memory or disk: run the same command again, or join a cluster that is "
        "up with --address"
    )


def is_connected() -> bool:
    """Whether this process is a driver of a cluster."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _authenticate(variables: Mapping[str, str]) -> None:
    """Set how Ray authenticates in this process and what it starts."""
    os.environ.update(variables)
    raylet: Any = importlib.import_module("ray._raylet")  # no type stubs
    raylet.Config.initialize("")  # Ray may have been imported before the variables were set
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _credentials(address: str) -> dict[str, str]:
    """How to speak to a cluster: a client with a token can join one without authentication, but
    that cluster cannot call it back, so both sides must agree."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    if address == ray_head.address():
        return ray_head.token_environment()
    if not _asks_for_token(address):
        return {"RAY_AUTH_MODE": "disabled"}
    if not ray_head.has_users_token():
        raise PlacementError(
            f"the cluster at {address} asks for a token; copy its ~/.ray/auth_token here, or set "
            "RAY_AUTH_TOKEN"
        )
    return {"RAY_AUTH_MODE": "token"}


def _asks_for_token(address: str, *, timeout_s: float = 10.0) -> bool:
    """Whether a call without one is refused, asked directly: Ray itself would retry for long."""
    grpc: Any = importlib.import_module("grpc")  # no type stubs
    with grpc.insecure_channel(address.removeprefix("ray://")) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def _join(address: str) -> None:
    _authenticate(_credentials(address))
    import ray

    inherited, copy = ray_head.environment(address), current_copy()
    environment = runtime_env(inherited)
    _init(address, environment)
    if inherited and sum(node["Alive"] for node in ray.nodes()) > 1:
        ray.shutdown()
        environment = runtime_env({})  # other nodes inherit nothing from the head
        _init(address, environment)
    if settled(copy):
        ray.shutdown()
        _init(address, environment)


def _init(address: str, environment: dict[str, dict[str, str]]) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    from cluster.session import ray_errors

    ray_errors.in_one_line()
    try:
        with kept():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
    except Exception as error:  # of a cluster too busy to answer, Ray's own is a plain Exception
        if versions := ray_errors.other_versions(str(error)):
            raise PlacementError(f"the cluster at {address} {versions}") from None
        refused = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if not isinstance(error, AuthenticationError | ConnectionError | RuntimeError):
            raise PlacementError(
                f"the cluster at {address} cannot be joined: {refused}; it may be busy: run the "
                "same command again"
            ) from error
        raise PlacementError(
            f"the cluster at {address} cannot be joined: {refused}; where it asks for a token, "
            "copy its ~/.ray/auth_token here, or set RAY_AUTH_TOKEN and RAY_AUTH_MODE=token"
        ) from None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Connected to a cluster that is there; to one of ours, for as long as it is."""
    own = address == ray_head.address()
    gone = partial(ray_head.is_gone, time.time())
    with _ends_with_head(gone) if own else nullcontext():
        _join(address)
        yield


@contextmanager
def _private() -> Iterator[None]:
    """Connected to a cluster of this process alone, for as long as it is there."""
    _start_private()
    from ray._private import worker

    node: Any = worker._global_node
    head = [info.process for kind in HEAD for info in node.all_processes.get(kind, ())]
    with _ends_with_head(lambda: any(process.poll() is not None for process in head)):
        yield


def _start_private() -> None:
    own = {} if "RAY_AUTH_MODE" in os.environ else ray_head.token_environment()
    _authenticate(own)
    import ray

    ahead = {} if (os.cpu_count() or 1) <= FEW_CORES else NONE_AHEAD
    try:
        with kept(), without_needless(), with_variables(JOB_ENVIRONMENT | ahead):
            ray.init(
                address="local",
                resources=ray_head.ROLE_RESOURCES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=ray_head.object_store_bytes(),
            )
    except Exception as error:  # Ray's own is a plain Exception
        raise PlacementError(not_started(error)) from error


@contextmanager
def without_needless() -> Iterator[None]:
    """Let Ray start no needless process of a head in a `with`: each takes half a second of a core
    or more. Ray has switches for some, in `ray start` alone; where it starts them otherwise, they
    are there."""
    from ray._private.node import Node

    before = {name: vars(Node)[name] for name in NEEDLESS if name in vars(Node)}
    for name in before:
        setattr(Node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _ends_with_head(gone: Callable[[], bool]) -> Iterator[None]:
    """End this command, for the length of a `with`, once a head of ours is gone, as after a signal
    to all processes of a job: Ray would wait for a minute for it, and then abort."""
    if not handled():
        yield
        return
    leaving = threading.Event()

    def watch() -> None:
        while not leaving.wait(HEAD_POLL_S):
            if gone():
                end_at_once()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        leaving.set()
        watcher.join()


def _leave() -> None:
    import ray

    ray.shutdown()


def _end_private() -> None:
    """End a head that ends with this process. Ray would wait a second for each of its processes,
    one after the other; nothing is left for them to do."""
    import ray
    from ray._private import worker

    node: Any = worker._global_node
    if node is None:
        return  # it did not come up
    family = _family(info.process.pid for kind in node.all_processes.values() for info in kind)
    kill = node.kill_all_processes
    node.kill_all_processes = lambda **_: kill(check_alive=False)
    ray.shutdown()
    for process in family:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=END_S)


def _family(pids: Iterable[int]) -> list[psutil.Process]:
    """Processes that are there, and all below them."""
    found = []
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found

"""A cluster's dashboard, which takes jobs: reached, of the same Ray, and with the token it asks
for."""

import importlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from cluster.session.session import prepare_environment, with_variables
from shared.errors import ConfigError, PlacementError

PORT = 8265  # unless `ray start` is told another
HERE = f"http://127.0.0.1:{PORT}"
ANSWER_S = 5.0
AGENT_S, AGENT_POLL_S = 60.0, 1.0  # Ray's name for what runs jobs on a node is an agent
STARTING_S = 20.0  # `ray start` may return before the dashboard that it starts is there
MAY_COME = SLOW, ABSENT = "it took too long", "nothing of it is there"
VARIABLE = "RAY_API_SERVER_ADDRESS"  # as `ray job` reads it


class Dashboard:
    """Jobs of one cluster. Methods raise UserErrors of one sentence."""

    def __init__(self, address: str | None = None, *, patience_s: float = 0.0) -> None:
        """Reach `address`, else RAY_API_SERVER_ADDRESS, else one on this machine, within
        `patience_s`: that of a head that has only just started comes after it. Raises
        PlacementError where no dashboard answers, one of another Ray, or one that refuses."""
        self.url = _url(address)
        self.given = address
        self._headers = _headers(self.url, patience_s)

    @cached_property
    def client(self) -> Any:
        """Ray's own client of jobs; Ray takes long to import."""
        prepare_environment()
        sdk: Any = importlib.import_module("ray.job_submission")
        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
        # The client prefers the variable to its argument.
        with with_variables({VARIABLE: self.url}):
            return sdk.JobSubmissionClient(self.url, headers=self._headers)

    def page(self, job: str) -> str:
        """The job's page for a browser."""
        return f"{self.url}/#/jobs/{job}"

    def command(self, verb: str, job: str = "") -> str:
        """What to type for a job here, as `tutelage jobs stop ID`."""
        words = ["tutelage jobs", verb, job, f"--address {self.given}" if self.given else ""]
        return " ".join(filter(None, words))

    def submit(self, job: str, entrypoint: str, **parts: Any) -> None:
        """Start a job under an id of one's own; `parts` are those of Ray's `submit_job`. A head
        that has only just started is given time until it takes jobs."""
        deadline = time.monotonic() + AGENT_S
        with self._asking():
            while True:
                try:
                    self.client.submit_job(entrypoint=entrypoint, submission_id=job, **parts)
                    return
                except RuntimeError as error:
                    if "agent" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(AGENT_POLL_S)

    def jobs(self) -> list[Any]:
        """Jobs that were submitted, the oldest first, as Ray describes them."""
        with self._asking():
            found = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def job(self, job: str) -> Any:
        """A job as Ray describes it. Raises ConfigError where there is none of that id."""
        known = {found.submission_id: found for found in self.jobs()}
        if job not in known:
            near = get_close_matches(job, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"there is no job {job} at {self.url}; {meant}`{self.command('ls')}` lists them"
            )
        return known[job]

    def stop(self, job: str) -> None:
        """Ask a job to end; it may take its time."""
        with self._asking():
            self.client.stop_job(job)

    def log(self, job: str) -> str:
        """All that a job has said."""
        with self._asking():
            return self.client.get_job_logs(job)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        ray: Any = importlib.import_module("ray.exceptions")
        refusals = (RuntimeError, ConnectionError, requests.RequestException, ray.RayError)
        try:
            yield
        except refusals as error:
            raise PlacementError(
                f"the cluster at {self.url} did not do what it was asked: {_said(error)}; see "
                "whether it is well, and run the same command again"
            ) from error


def _said(error: Exception) -> str:
    """What Ray says in a line; of a traceback that it sends, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1 if "Traceback" in str(error) else 0] if lines else type(error).__name__
    return line.rstrip(".")


def _url(address: str | None) -> str:
    """Of the dashboard, without a path. Raises PlacementError for an address that is none."""
    asked = address or os.environ.get(VARIABLE) or _web_address_of_ray() or HERE
    bare = "://" not in asked
    try:
        parts = urlsplit(f"http://{asked}" if bare else asked)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        raise PlacementError(
            f"--address is {asked}, which is no dashboard's; jobs go to http://HEAD:{PORT}, the "
            "address that `ray start --head` prints for its dashboard"
        )
    return f"{parts.scheme}://{parts.netloc}" + (f":{PORT}" if bare and port is None else "")


def _web_address_of_ray() -> str | None:
    """RAY_ADDRESS where it is a dashboard's, as Ray's documentation sets it for jobs."""
    address = os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith(("http://", "https://")) else None


def _headers(url: str, patience_s: float) -> dict[str, str]:
    """What requests carry: the user's token where the dashboard asks for one. Raises
    PlacementError."""
    answer = _version(url, {}, patience_s)
    headers: dict[str, str] = {}
    if answer.status_code == 401:
        headers = {"Authorization": f"Bearer {_token(url)}"}
        answer = _version(url, headers)
    if answer.status_code in (401, 403):
        raise PlacementError(
            f"the dashboard at {url} refuses this token; copy the head's ~/.ray/auth_token here, "
            "or set RAY_AUTH_TOKEN"
        )
    _refuse_other_version(url, answer)
    return headers


def _way_to_one(url: str, why: str) -> str:
    if url == HERE and why == ABSENT:
        return "`ray start --head` starts a cluster with one here, and --address names another's"
    return (
        f"its port is {PORT} unless `ray start` was told another, and other machines reach it with "
        "--dashboard-host 0.0.0.0"
    )


def _version(url: str, headers: dict[str, str], patience_s: float = 0.0) -> requests.Response:
    deadline, told = time.monotonic() + patience_s, patience_s <= 0
    while True:
        try:
            return requests.get(f"{url}/api/version", headers=headers, timeout=ANSWER_S)
        except requests.RequestException as error:
            why = _why(error)
        if why not in MAY_COME or time.monotonic() > deadline:
            raise PlacementError(f"no dashboard answers at {url}: {why}; {_way_to_one(url, why)}")
        if not told:
            print(f"Waiting    for a dashboard at {url}, up to {patience_s:.0f} s", flush=True)
            told = True
        time.sleep(AGENT_POLL_S)


def _why(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted here"
    if "resolve" in str(error) or "Name or service" in str(error):
        return "no machine of that name is known here"
    return SLOW if isinstance(error, requests.Timeout) else ABSENT


def _token(url: str) -> str:
    """The user's token, found where Ray looks for it."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if file.is_file():
        return file.read_text().strip()
    raise PlacementError(
        f"the cluster at {url} asks for a token; copy its ~/.ray/auth_token here, or set "
        "RAY_AUTH_TOKEN"
    )


def _refuse_other_version(url: str, answer: requests.Response) -> None:
    """Refuse a head whose Ray has another minor version than ours. Raises PlacementError."""
    try:
        theirs = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise PlacementError(
            f"{url} answers, but not as a dashboard of Ray does; check --address"
        ) from None
    ours = version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise PlacementError(
            f"the cluster at {url} runs Ray {theirs}, but Ray {ours} is installed here; install "
            "the same version on both"
        )

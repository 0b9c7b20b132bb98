"""Dashboards that take no job from here: one sentence each, before anything is sent."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest

from cluster.cli import main
from cluster.submission import dashboard
from cluster.submission.dashboard import Dashboard
from shared.errors import PlacementError

OURS = version("ray")
MAJOR, MINOR, _ = (int(part) for part in OURS.split("."))
Answer = Callable[[str | None], tuple[int, str]]  # of an Authorization header


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Serve one answer on every path; returns the address."""
    servers = []

    def start(answer: Answer, port: int = 0) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = answer(self.headers["Authorization"])
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def of_version(ray: str) -> Answer:
    return lambda token: (200, json.dumps({"version": "4", "ray_version": ray}))


def asking_for(wanted: str) -> Answer:
    def answer(token: str | None) -> tuple[int, str]:
        if token is None:
            return 401, "Unauthorized"
        return of_version(OURS)(token) if token == f"Bearer {wanted}" else (403, "Forbidden")

    return answer


def refusal(address: str) -> str:
    with pytest.raises(PlacementError) as refused:
        Dashboard(address)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("theirs", [f"{MAJOR}.{MINOR - 1}.0", f"{MAJOR}.{MINOR + 1}.3", "1.13.0"])
def test_a_head_of_another_version_is_refused_with_both(serve, theirs):
    said = refusal(serve(of_version(theirs)))
    assert f"runs Ray {theirs}, but Ray {OURS} is installed here" in said


def test_a_head_of_another_patch_takes_jobs(serve):
    address = serve(of_version(f"{MAJOR}.{MINOR}.9"))
    assert Dashboard(address).url == address


def test_a_token_is_sent_where_one_is_asked_for_and_only_there(serve, monkeypatch, tmp_path):
    asked = serve(asking_for("abc"))
    assert "asks for a token; copy its ~/.ray/auth_token here" in refusal(asked)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "refuses this token" in refusal(asked)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc\n")
    Dashboard(asked)
    seen = []
    answer = of_version(OURS)
    Dashboard(serve(lambda token: seen.append(token) or answer(token)))
    assert seen == [None]


def test_what_is_no_dashboard_is_refused(serve):
    assert "not as a dashboard of Ray does" in refusal(serve(lambda _: (200, "hello")))
    assert "not as a dashboard of Ray does" in refusal(serve(lambda _: (404, "[]")))
    for address in ("ray://head:10001", "s3://head", "http://", "http://[", "head:port"):
        assert f"--address is {address}, which is no dashboard's" in refusal(address)


@pytest.mark.parametrize("command", [("ls",), ("logs", "x"), ("stop", "x")])
def test_a_dashboard_that_cannot_be_reached_is_named_in_seconds(command, capsys):
    began = time.monotonic()
    assert main(["jobs", *command, "--address", "127.0.0.1:9"]) == 2
    assert (
        "no dashboard answers at http://127.0.0.1:9: nothing of it is there"
        in capsys.readouterr().err
    )
    assert time.monotonic() - began < 60


def test_where_nothing_is_on_this_machine_the_way_to_a_cluster_is_said(monkeypatch):
    monkeypatch.setattr(dashboard, "HERE", "http://127.0.0.1:9")
    monkeypatch.setattr(dashboard, "_web_address_of_ray", lambda: None)
    monkeypatch.delenv(dashboard.VARIABLE, raising=False)
    with pytest.raises(PlacementError, match="`ray start --head` starts a cluster with one here"):
        Dashboard()


def test_a_head_that_has_only_just_started_is_given_time_where_a_job_is_sent(serve, capsys):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    timer = threading.Timer(1.5, serve, [of_version(OURS)], {"port": port})
    timer.start()
    assert Dashboard(f"127.0.0.1:{port}", patience_s=30.0).url == f"http://127.0.0.1:{port}"
    timer.join()
    waited = f"Waiting    for a dashboard at http://127.0.0.1:{port}, up to 30 s"
    assert capsys.readouterr().out.splitlines() == [waited]
    began = time.monotonic()
    with pytest.raises(PlacementError, match="no machine of that name"):
        Dashboard("http://head.invalid:8265", patience_s=30.0)
    assert time.monotonic() - began < 20


def test_a_host_that_nobody_knows_is_called_that():
    assert "no machine of that name is known here" in refusal("http://head.invalid:8265")


def test_an_address_is_the_option_else_the_variable(serve, monkeypatch):
    first, second = serve(of_version(OURS)), serve(of_version(OURS))
    monkeypatch.setenv("RAY_ADDRESS", second)
    assert Dashboard().url == second
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", first)
    assert Dashboard().url == first
    assert Dashboard(f"{second}/#/jobs").url == second
    assert Dashboard(second).command("stop", "x") == f"tutelage jobs stop x --address {second}"
    assert Dashboard().command("ls") == "tutelage jobs ls"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # where drivers go is no dashboard
    assert "no dashboard answers at http://absent.invalid:8265: " in refusal("absent.invalid")

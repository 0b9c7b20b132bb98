"""Trackers that cannot be used are refused before the start, in one sentence."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.cli import main
from shared.errors import ConfigError
from student_trainer.tracking import services
from student_trainer.tracking.services import SERVICES, refuse_unready
from tests.cluster.jobs import write_job

VARIABLES = (
    *("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME"),
    *("DATABRICKS_HOST", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WRITE_TOKEN"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No variable and no file that a tracker reads keys from; every package is there."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(services, "find_spec", lambda name: object())


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_unready([name])
    return str(caught.value)


@pytest.fixture
def server():
    """An MLflow server that knows one user."""
    known = base64.b64encode(b"me:word").decode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            allowed = self.headers.get("Authorization") == f"Basic {known}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *said):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()


@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_not_there_is_named_before_the_start(
    name, tmp_path, tiny_pair, monkeypatch, capsys
):
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    job = write_job(tmp_path, tiny_pair, trackers=[name])
    assert main(["run", str(job)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"pip install 'tutelage[{name}]'" in said
    assert not (tmp_path / "runs").exists()


def test_weights_and_biases_wants_a_key_or_to_be_offline(tmp_path, monkeypatch):
    assert "set WANDB_API_KEY, or set WANDB_MODE=offline" in refused("wandb")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abcdef\n")
    refuse_unready(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "has no key" in refused("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    refuse_unready(["wandb"])


def test_mlflow_asks_its_server(server, monkeypatch):
    refuse_unready(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert "refuses (401); set MLFLOW_TRACKING_USERNAME" in refused("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    refuse_unready(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in refused("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden-word@host")
    assert "hidden-word" not in refused("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    assert "DATABRICKS_HOST" in refused("mlflow")


def test_trackio_wants_a_token_for_a_space_or_a_server(monkeypatch):
    refuse_unready(["trackio"])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/curves")
    assert "there is no token for it" in refused("trackio")
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "https://host")
    assert "TRACKIO_WRITE_TOKEN is not set" in refused("trackio")

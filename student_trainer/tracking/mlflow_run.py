"""MLflow: the server or folder of MLFLOW_TRACKING_URI, else `mlruns` beside the runs."""

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from student_trainer.tracking.tracker import Service, TrackedRun

URI = "MLFLOW_TRACKING_URI"
ID = "tutelage.id"
MOST_PARAMS = 100  # of one request
MOST_CHARS = 500  # of an option's value
ANSWER_S = 10.0


class MLflowRun:
    """A run of MLflow, found again by its tag; options are its parameters, which never change."""

    def __init__(self, tracked: TrackedRun) -> None:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # folders, without a database
        uri = os.environ.get(URI) or (tracked.runs.absolute() / "mlruns").as_uri()
        self._client = mlflow.MlflowClient(uri)
        experiment = _experiment(self._client)
        asked = f"tags.`{ID}` = '{tracked.id}'"
        known = self._client.search_runs([experiment], filter_string=asked, max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {ID: tracked.id}
            made = self._client.create_run(experiment, run_name=tracked.name, tags=tags)
            self._id = made.info.run_id
            self._describe(tracked.options)

    def _describe(self, options: Mapping[str, Any]) -> None:
        named = self._entities.Param
        params = [named(_name(n), str(value)[:MOST_CHARS]) for n, value in options.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_name(n), v, now, step) for n, v in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def note(self, step: int, text: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self._id, f"tutelage.step-{step}", text)

    def close(self) -> None:
        """Say that nothing more comes."""
        self._client.set_terminated(self._id)


def _name(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tutelage")
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _lacks() -> str | None:
    uri = os.environ.get(URI, "")
    if "@" in urlsplit(uri).netloc:
        return (
            f"{URI} holds a password, which would stand in logs; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
    if uri.startswith("databricks"):
        known = os.environ.get("DATABRICKS_HOST") or Path("~/.databrickscfg").expanduser().exists()
        return None if known else "it has no Databricks credentials; set DATABRICKS_HOST and _TOKEN"
    return _refusal(uri) if uri.startswith("http") else None


def _refusal(uri: str) -> str | None:
    """Why a server does not let us look at its experiments."""
    asked = urllib.request.Request(
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json", **_authorisation()},
    )
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return (
                f"the server at {uri} refuses ({error.code}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return f"the server at {uri} answers {error.code}; check {URI}"
    except (OSError, ValueError):
        return f"no server answers at {uri}; check {URI}"


def _authorisation() -> dict[str, str]:
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}


MLFLOW = Service("MLflow", "mlflow", MLflowRun, _lacks)

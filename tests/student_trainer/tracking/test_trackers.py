"""Runs in the trackers themselves, offline: one curve per run, whatever becomes of its process."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.config.mixture import FixedMixture
from shared.config.run import Config
from shared.run.metrics import append_metrics, drop_metrics_after
from shared.run.run_dir import RunDir
from student_trainer.tracking.services import SERVICES
from student_trainer.tracking.trackers import open_trackers
from tests import tiny
from tests.cluster.run_dirs import controlled
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.student_trainer.tracking.test_tensorboard import events, line, points

Found = tuple[list[tuple[int, float]], str]  # points of the loss; what else is said


@pytest.fixture(params=SERVICES)
def service(request, tmp_path, monkeypatch) -> str:
    """A tracker that is installed, offline, with all it writes in a folder of the test."""
    pytest.importorskip(SERVICES[request.param].package, reason="an extra that is not installed")
    monkeypatch.setattr("student_trainer.tracking.trackers.CLOSE_S", 200.0)  # imports are slow here
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if request.param == "trackio":
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    return request.param


def records(log: bytes) -> Iterator[bytes]:
    """What lies in a file of W&B: a header of 7 bytes, then LevelDB's log of 32 KB blocks, in which
    each piece of a record has its checksum, length and kind."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is no piece
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        record, at = record + log[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def in_wandb(runs: Path, run: str) -> Found:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process writes what it has been given
    found, said, ids = [], [], set()
    for path in sorted((runs / run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                said.append(record.run.notes)
            values = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss" in values:
                found.append((json.loads(values["step"]), json.loads(values["loss"])))
    assert len(ids) == 1
    return found, "\n".join(said)


def in_mlflow(runs: Path, run: str) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient((runs / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tutelage")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.run_name == run
    assert one.info.status == "FINISHED"
    assert one.data.params["steps"]
    history = client.get_metric_history(one.info.run_id, "loss")
    return [(m.step, m.value) for m in history], json.dumps(one.data.tags)


def in_trackio(runs: Path, run: str) -> Found:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("tutelage")
    assert name.startswith(f"{run}-")
    logs = SQLiteStorage.get_logs("tutelage", name)
    return [(log["step"], log["loss"]) for log in logs if "loss" in log], json.dumps(logs)


FOUND: dict[str, Callable[[Path, str], Found]] = {
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


def attempt(
    folder: Path, config: Config, *, after: int, losses: dict[int, float], said: list[str]
) -> None:
    """What a process does for trackers between its start, or a resume, and its end."""
    files = RunDir(folder)
    drop_metrics_after(files.metrics, after)
    trackers = open_trackers(files, config, step=after, tell=said.append)
    for step, loss in losses.items():
        trackers.write(line(step, loss), config, steps_in_line=2)
        append_metrics(files.metrics, line(step, loss))
    trackers.close()


def config_of(folder: Path, **options: object) -> Config:
    config = controlled(FixedMixture(), domains=("code", "math"))
    paths = config.paths.model_copy(update={"runs": str(folder.parent)})
    return config.model_copy(update={"name": folder.name, "paths": paths, **options})


def test_a_resumed_run_continues_its_curves_and_says_that_its_config_changed(tmp_path, service):
    folder = tmp_path / "runs" / "job"
    folder.mkdir(parents=True)
    config, said = config_of(folder, trackers=[service]), []
    attempt(folder, config, after=0, losses={2: 3.0, 4: 2.5, 6: 2.0}, said=said)
    attempt(folder, config, after=4, losses={6: 2.0, 8: 1.5}, said=said)
    changed = config.model_copy(update={"log_every": 7})
    attempt(folder, changed, after=8, losses={14: 1.0}, said=said)
    assert said == []
    found, noted = FOUND[service](folder.parent, "job")
    assert found == [(2, 3.0), (4, 2.5), (6, 2.0), (8, 1.5), (14, 1.0)]
    note = f"from step 8 with log_every 7 (was {config.log_every})"
    assert note in noted
    assert "from step 4" not in noted
    assert points(folder / "tensorboard", "loss") == dict(found)
    texts = [e for file in (folder / "tensorboard").iterdir() for e in events(file)]
    assert any(note.encode() in event.SerializeToString() for event in texts)


def test_a_tracker_that_is_named_later_gets_the_lines_before(tmp_path, service):
    folder = tmp_path / "runs" / "job"
    folder.mkdir(parents=True)
    said: list[str] = []
    attempt(folder, config_of(folder), after=0, losses={2: 3.0, 4: 2.5}, said=said)
    config = config_of(folder, trackers=[service])
    attempt(folder, config, after=4, losses={6: 2.0}, said=said)
    assert said == []
    found, _ = FOUND[service](folder.parent, "job")
    assert found == [(2, 3.0), (4, 2.5), (6, 2.0)]


def test_a_real_run_that_is_killed_and_resumed_has_each_step_once(tmp_path):
    pytest.importorskip("mlflow", reason="an extra that is not installed")
    from mlflow import MlflowClient

    folder = tmp_path / "runs" / "job"
    plan = plan_of(
        folder,
        tiny.save_pair(tmp_path / "pair", tied=True),
        prepared_domains(tmp_path),
        log_every=1,
        trackers=["mlflow"],
    )
    run_jobs([as_job("resumed", plan, at=2)], tmp_path / "jobs")
    client = MlflowClient((folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tutelage")
    (one,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(one.info.run_id, "loss")
    assert [m.step for m in history] == [1, 2, 3, 4]
    curve = points(folder / "tensorboard", "loss")
    assert [m.value for m in history] == pytest.approx(list(curve.values()), rel=1e-6)
    assert "mlflow" not in (folder / "logs" / "progress.log").read_text().lower()

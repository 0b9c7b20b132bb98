"""`tutelage capture` through the command line: what it asks, that it goes on, and that a run needs
no teacher after it."""

import json
import re
from pathlib import Path

import pytest

from cluster.cli import main
from shared.metrics import read_metrics
from shared.run_dir import RunDir
from shared.target_store import TargetStore, stored_answers
from tests.cluster.jobs import write_job
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def captured(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A config of fixed weights whose answers are in its store."""
    folder = tmp_path_factory.mktemp("captured")
    job = write_job(
        folder,
        tiny_pair,
        steps=4,
        mixture={"policy": "fixed"},
        targets={"store": str(folder / "store"), "top_k": 16},
    )
    assert main(["capture", str(job)]) == 0
    return job


def rows_stored(job: Path) -> dict[int, int]:
    """Rows in the job's store by how many ids were kept."""
    store = job.parent / "store"
    return {
        a.spec.top_k: len(TargetStore(store, teacher=a.teacher, spec=a.spec))
        for a in stored_answers(store)
    }


def test_capture_without_a_store_is_refused_before_anything_starts(tmp_path, tiny_pair, capsys):
    assert main(["capture", str(write_job(tmp_path, tiny_pair))]) == 2
    assert "set targets.store=FOLDER" in capsys.readouterr().err


def test_a_capture_holds_what_the_steps_draw_and_all_validation_rows(captured):
    assert rows_stored(captured) == {16: 4 * 4, VOCAB: 2 * 4}


def test_a_captured_run_needs_no_teacher(captured):
    assert main(["run", str(captured), "name=warm", "targets.teacher_free=true"]) == 0
    run = RunDir(captured.parent / "runs" / "warm")
    summary = json.loads(run.summary.read_text())
    assert summary["cache_hit_rate"] == 1.0
    assert all(line.cache_hits == line.units > 0 for line in read_metrics(run.metrics))
    assert all(d["kl_kind"] == "full" for d in summary["domains"].values())


def test_the_same_command_asks_only_for_what_is_not_stored(captured, capsys):
    assert main(["capture", str(captured), "steps=5"]) == 0
    said = capsys.readouterr().out
    assert "asked 4 rows" in said
    assert f"Train     tutelage run {captured} steps=5 targets.teacher_free=true" in said
    (off,) = re.findall(r"differ by at most ([0-9.e+-]+) nats", said)
    assert float(off) < 1e-4
    assert rows_stored(captured) == {16: 5 * 4, VOCAB: 2 * 4}

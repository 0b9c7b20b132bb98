"""A run whose teacher scales itself: its words, and the numbers of one whose teacher does not."""

import json
import threading
from typing import Any

import pytest

from cluster.cli import main
from cluster.report.services import read_roll, read_scaling
from shared.run.run_dir import RunDir
from teacher_service.service import service
from teacher_service.service.scaling.policy import Pace
from tests.cluster.jobs import write_job

TIMED = {"seconds", "wait_s", "teacher_wait_s", "compute_s", "optimiser_s", "tokens_per_s"}
QUICK = Pace(grow_s=1.0, shrink_s=600.0)


def numbers(values: Any) -> Any:
    """What metrics say, without what a clock says."""
    if isinstance(values, dict):
        return {name: numbers(value) for name, value in values.items() if name not in TIMED}
    return [numbers(value) for value in values] if isinstance(values, list) else values


def metrics(run: RunDir) -> list:
    return [numbers(json.loads(line)) for line in run.metrics.read_text().splitlines()]


@pytest.mark.drill
def test_a_run_that_is_given_replicas_in_its_middle_learns_the_same_to_the_bit(
    ray_cluster, tmp_path, tiny_pair, capsys, monkeypatch
):
    monkeypatch.setattr(service, "PACE", QUICK)
    steps = 400
    job = write_job(tmp_path, tiny_pair, steps=steps, log_every=20)
    served: set[str] = set()
    bounds: set[tuple[int | None, int | None]] = set()

    def look() -> None:
        run_dir = RunDir(tmp_path / "runs" / "scaled")
        while len(served) < 2 and not ended.wait(0.1):
            roll = read_roll(run_dir)
            served.update(one["name"] for one in roll["replicas"] if one["units"])
            bounds.update((one["min"], one["max"]) for one in roll["services"])

    ended = threading.Event()
    looking = threading.Thread(target=look)
    looking.start()
    scaled = "teachers.tiny.replicas={max: 2, wait: 0.0001}"
    assert main(["run", str(job), "name=scaled", scaled]) == 0
    ended.set()
    looking.join()
    said = capsys.readouterr().out
    assert "from 1 to 2 replicas, more where steps wait above 0.01 % of their time" in said
    assert ": 1 -> 2 replicas, steps waited" in said
    assert served == {"replica-0", "replica-1"}
    assert bounds == {(1, 2)}
    (change,) = read_scaling(RunDir(tmp_path / "runs" / "scaled").scaling)
    assert change["line"].startswith("1 -> 2 replicas, steps waited")
    assert 0 <= change["step"] < steps
    page = (tmp_path / "runs" / "scaled" / "report.html").read_text()
    assert "1 -&gt; 2 replicas, steps waited" in page
    assert main(["run", str(job), "name=fixed"]) == 0
    runs = [RunDir(tmp_path / "runs" / name) for name in ("scaled", "fixed")]
    assert metrics(runs[0]) == metrics(runs[1])
    weights = [(run.export / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]

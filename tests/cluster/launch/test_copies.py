"""Copies of the student that write, through the command line."""

import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.cli import main
from cluster.report.services import ReplicaStanding, read_roll
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from teacher_service.service import service as services
from tests.cluster.jobs import write_job
from tests.tiny import Pair

OWN = {"student": 0.5, "dataset": 0.5, "max_new_tokens": 8, "prompt_tokens": 4, "batch_rows": 1}


def run_of(folder: Path, pair: Pair, replicas: int) -> RunDir:
    """A run of which so many copies of the student write a half, or its workers."""
    copies = {"rollouts": {"replicas": replicas, "cpus": 0.25}} if replicas else {}
    job = write_job(folder, pair, source=OWN, **copies)
    assert main(["run", str(job), f"name=by-{replicas}"]) == 0
    return RunDir(folder / "runs" / f"by-{replicas}")


def test_copies_write_are_listed_and_leave_nothing_behind(ray_cluster, tmp_path, tiny_pair, capsys):
    seen: dict[str, ReplicaStanding] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            found = read_roll(RunDir(tmp_path / "runs" / "by-2"))["replicas"]
            seen.update({f"{one['service']}/{one['name']}": one for one in found if one["units"]})

    looking = threading.Thread(target=look)
    looking.start()
    try:
        run = run_of(tmp_path, tiny_pair, 2)
    finally:
        ended.set()
        looking.join()
    said = capsys.readouterr().out
    assert "loading the student to write, 2 x " in said
    assert "weights are pushed to the student's copies, " in said
    lines = read_metrics(run.metrics)
    assert all(line.pushed_bytes and line.rollouts.rollouts for line in lines)
    assert {name.rpartition("-")[2] for name in seen if "-rollouts/" in name} <= {"0", "1"}
    assert not run.weights.exists()
    assert not run.rollout_replicas.exists()
    assert not [name for name in services.list_services() if "rollouts" in name]


@pytest.mark.drill
def test_copies_give_the_run_of_workers_that_write(ray_cluster, tmp_path, tiny_pair):
    runs = [run_of(tmp_path, tiny_pair, replicas) for replicas in (0, 1, 3)]
    own, *others = (load_file(run.export / "model.safetensors") for run in runs)
    for other in others:
        assert own.keys() == other.keys()
        assert all((own[name] == other[name]).all() for name in own)

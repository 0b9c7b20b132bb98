"""A teacher whose modules learn beside the student, through the command line."""

from pathlib import Path

import pytest

from cluster.cli import main
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from tests.cluster.jobs import write_job
from tests.tiny import Pair


def job_of(folder: Path, pair: Pair, **more: object) -> Path:
    modules = {"r": 4, "lr": 0.01, "eta": 0.5, "top_k": 16}
    teacher = {"model": str(pair.teacher), "cpus": 0.25, "replicas": 2, "online_modules": modules}
    return write_job(folder, pair, teachers={"tiny": teacher}, **more)


def test_modules_of_replicas_learn_beside_the_student(ray_cluster, tmp_path, tiny_pair):
    assert main(["run", str(job_of(tmp_path, tiny_pair))]) == 0
    run = RunDir(tmp_path / "runs" / "job")
    lines = [line.modules for line in read_metrics(run.metrics)]
    assert [line and line.version for line in lines] == [2, 4, 6]
    assert all(line and line.nll > 0 and (line.student_kl or 0) > 0 for line in lines)
    kept = sorted(path.name.split(".")[0] for path in run.modules.glob("*.safetensors"))
    # Checkpoints are at steps 3 and 6, and the lag is 1.
    assert kept == [f"version-{version:06d}" for version in (2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("train", [], "online_modules learn beside the student of one run"),
        ("teacher up", [], "online_modules learn beside the student of one run"),
        ("run", ["losses=[{kind: cross_entropy}]"], "online_modules is set, but no loss asks"),
        ("run", ["targets.store=answers"], "which keeps answers for any"),
        ("run", ["teachers.tiny.quantisation=int8"], "quantisation is int8"),
        ("run", ["teachers.tiny.online_modules.r=0"], "teachers.tiny.online_modules.r"),
        ("capture", [], "targets.store"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path, tiny_pair, capsys, verb, options, said
):
    assert main([*verb.split(), str(job_of(tmp_path, tiny_pair)), *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()

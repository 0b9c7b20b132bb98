"""`tutelage plan --probe` through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.commands.plan import plan
from tests.cluster.jobs import two_teachers, write_job
from tests.telling import telling

PARTS = {"weights", "optimiser", "gradients", "teacher's head", "activations and loss"}


def left(folder: Path) -> list[Path]:
    """Everything that a probe could leave behind."""
    return [*folder.glob("runs/*"), *folder.glob("cache/probes/*")]


def test_a_probe_measures_each_process_of_each_side(ray_cluster, tiny_pair, tmp_path, capsys):
    path = write_job(tmp_path, tiny_pair, targets={"selector": "top_k", "top_k": 32})
    assert main(["plan", str(path), "--probe", "--json", "--price", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert left(tmp_path) == []

    (student,) = found["probe"]["student"]
    parts, formula = student["memory"]["parts"], found["student"]["memory"]["parts"]
    assert set(parts) == PARTS
    for name in ("weights", "optimiser", "gradients"):
        assert parts[name] == pytest.approx(formula[name], rel=0.02)
    assert parts["activations and loss"] > parts["weights"]
    assert student["memory"]["libraries"] > 10**8
    # The longest rows come first: what follows needs no more, but for the allocator's rounding.
    assert student["later_bytes"] <= 1.02 * student["longest_bytes"]
    assert 0 < student["logits"]["widest"] <= student["logits"]["chunk"]
    for step in student["steps"]:
        assert step["wait"] + step["compute"] + step["optimiser"] <= step["seconds"]
        assert step["tokens"] > 0
    assert student["checkpoint_bytes"] > 3 * parts["weights"]

    (replica,) = found["probe"]["teachers"]["tiny"]
    assert replica["timed"] > replica["followed"] > 0
    assert replica["logits"]["widest"] <= replica["logits"]["positions"]
    assert replica["seconds"] > 0
    assert found["pace"]["student_s"] > 0
    assert found["seconds"] > found["pace"]["student_s"] * found["config"]["steps"]


@pytest.mark.drill
def test_each_of_two_teachers_and_workers_stands_beside_the_formula(
    ray_cluster, tiny_pair, tmp_path, capsys
):
    path = write_job(tmp_path, tiny_pair, **two_teachers(tiny_pair))
    changed = ("student.zero=2", "student.workers=2", "student.cpus=0.3")
    found = plan(path, changed, probe=True)
    assert found.probe is not None
    # DeepSpeed's reduction bucket of 2 GB is hardly written to.
    assert sum(found.probe.memory("student").parts.values()) < 10**7
    told = capsys.readouterr().out
    for said in ("formula    measured", "kept by allocators", "libraries", "in all", "Bounded"):
        assert said in told
    assert "forward and backward" in told
    for said in ("loss tokens/s a worker", "one,", "two,", "2 x student,"):
        assert said in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("batch.micro_batch=400000", "batch.rows_per_step=400000", "--memory", "900TB"),
            "are free",
        ),
        (
            ("source={student: 0.5, dataset: 0.5, max_new_tokens: 8}", "baseline=false"),
            "a probe takes steps of the data set alone; plan without --probe",
        ),
        pytest.param(
            ("student.gpus=1",),
            "set student.gpus=0 (gpus: 0)",
            marks=[
                pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
                pytest.mark.drill,
            ],
        ),
    ],
)
def test_what_cannot_be_probed_here_is_one_sentence(options, sentence, tiny_pair, tmp_path, capsys):
    assert main(["plan", str(write_job(tmp_path, tiny_pair)), *options, "--probe"]) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1]
    assert "plan without --probe" in said
    assert left(tmp_path) == []


@pytest.mark.parametrize("side", telling(["teacher", "student"], "teacher"))
def test_a_model_without_weights_is_not_probed(side, tiny_pair, tmp_path, capsys):
    folder = tmp_path / "bare"
    shutil.copytree(
        getattr(tiny_pair, side), folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    section = "student" if side == "student" else "teachers.tiny"
    path = write_job(tmp_path, tiny_pair)
    assert main(["plan", str(path), f"{section}.model={folder}", "--probe"]) == 2
    said = capsys.readouterr().err
    assert f"{section}.model is {folder}, a folder without weights" in said
    assert left(tmp_path) == []

"""A tagger, or a student that marks, from a teacher's answers on disk, by the commands that a user
gives."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from shared.config.file import dump
from tests.student_trainer.tasks import classified, tagged

SPANS = ("span_f1", "precision", "recall")


@pytest.fixture(
    scope="module", params=["tagging", pytest.param("marking", marks=pytest.mark.drill)]
)
def job(ray_cluster, tmp_path_factory, tiny_pair, request) -> Path:
    """A config whose run has finished, from answers that a capture wrote."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(tiny_pair.teacher, folder / "teacher")
    classified.save_bert(folder / "bert")
    marks, own = request.param == "marking", tiny_pair.student
    config = tagged.config_of(
        folder / "runs",
        "names",
        models=folder,
        teachers={"t": {"model": str(folder / "teacher"), "cpus": 0.2}},
        student={"cpus": 0.2, "workers": 1, "zero": 0} | ({"model": str(own)} if marks else {}),
        task={"kind": request.param},
        data={"context": 160 if marks else 64},
        targets={"store": str(folder / "store")},
        checkpoints={"every": 4},
    )
    path = folder / "job.yaml"
    path.write_text(dump(config))
    assert main(["capture", str(path)]) == 0
    assert main(["run", str(path), "targets.teacher_free=true"]) == 0
    return path


def test_eval_finds_the_entities_that_the_summary_says(job, capsys):
    run = job.parent / "runs" / "names"
    told = json.loads((run / "summary.json").read_text())["domains"]["names"]["classes"]
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads((run / "eval.json").read_text())
    writes = yaml.safe_load((run / "config.yaml").read_text())["task"]["kind"] == "marking"
    assert found["per"] == ("token" if writes else "word")
    assert any("span F1" in line and "recall" in line for line in said)
    assert max(map(len, said)) <= 100
    domain = found["domains"]["names"]
    assert (domain["bytes"] is None, domain["prompts"] > 0) == (not writes, writes)
    assert list(domain["models"]) == ["teacher", "before", "after"]
    for model, measured in domain["models"].items():
        assert measured["accuracy"] is None, "a row has several words"
        assert measured["nll"]["error"] > 0
        for score in SPANS:
            value = told[score][model]
            expected = None if value is None else {"value": value, "error": None}
            assert measured[score] == expected


def test_a_run_names_the_types_of_its_rows_in_its_config(job):
    found = yaml.safe_load((job.parent / "runs" / "names" / "config.yaml").read_text())
    assert found["task"]["types"] == sorted(tagged.NAMES)

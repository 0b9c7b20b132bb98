"""A classifier from a teacher's answers on disk, by the commands that a user gives."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cluster.cli import main
from student_trainer.tasks.classification import Classification
from tests.student_trainer.tasks.classified import (
    LABELS,
    rows_of,
    save_bert,
    save_classifier,
    write_rows,
)


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A config whose run has finished, from answers that a capture wrote: of a language model and
    of a classifier, each about a domain."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(tiny_pair.teacher, folder / "teacher")
    save_bert(folder / "own", own_tokenizer=True)
    save_classifier(folder / "head", folder / "own", LABELS[::-1])
    train = write_rows(folder / "train.jsonl", rows_of(1, count=30))
    valid = write_rows(folder / "valid.jsonl", rows_of(2, count=9))
    config = {
        "name": "kinds",
        "steps": 6,
        "log_every": 3,
        "paths": {"runs": str(folder / "runs"), "cache": str(folder / "cache")},
        "task": {"kind": "classification", "template": "Text: {text}"},
        "teachers": {
            "t": {"model": str(tiny_pair.teacher), "cpus": 0.2},
            "head": {"model": str(folder / "head"), "cpus": 0.2},
        },
        "student": {"model": "tiny", "cpus": 0.2, "zero": 0},
        "domains": {
            "kinds": {"train": str(train), "validation": str(valid), "teacher": "t"},
            "heads": {"train": str(train), "validation": str(valid), "teacher": "head"},
        },
        "data": {"context": 48},
        "batch": {"rows_per_step": 8, "micro_batch": 4},
        "targets": {"store": str(folder / "store")},
        "losses": [{"kind": "cross_entropy"}, {"kind": "soft_cross_entropy", "weight": 0.7}],
        "optimiser": {"lr": 1e-2},
        "checkpoints": {"every": 6},
        "baseline": True,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["capture", str(path)]) == 0
    assert main(["run", str(path), "targets.teacher_free=true"]) == 0
    return path


def test_a_finished_run_tells_how_well_all_tell_classes_apart(job, capsys):
    run = job.parent / "runs" / "kinds"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["tokens"] == 6 * 8, "a row has one"
    classes = summary["domains"]["kinds"]["classes"]
    assert summary["domains"]["heads"]["kl_kind"] == "full"
    weights, row_ms = classes.pop("weights"), classes.pop("row_ms")
    assert set(classes) == {"accuracy", "macro_f1", "calibration_error"}
    for told in classes.values():
        assert set(told) == {"teacher", "before", "after", "hard"}
        assert all(0 <= value <= 1 for value in told.values())
    own = load_file(run / "export" / "model.safetensors").values()
    assert weights["after"] == weights["before"] == sum(weight.numel() for weight in own)
    assert all(row_ms[who] > 0 for who in ("before", "after", "hard"))
    assert weights["teacher"] is row_ms["teacher"] is None, "answers lay on disk"
    assert main(["run", str(job), "targets.teacher_free=true"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "nats per row" in said
    assert "export/README.md says" in said
    assert f"student {weights['after'] / 1e6:.2f} M weights" in said
    assert "ms a row" in (run / "report.html").read_text()
    assert "macro F1" in (run / "report.html").read_text()


@pytest.mark.drill
def test_eval_tells_rows_from_rows_as_the_summary_does(job, capsys):
    run = job.parent / "runs" / "kinds"
    domains = json.loads((run / "summary.json").read_text())["domains"]
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads((run / "eval.json").read_text())
    assert found["per"] == "row"
    assert any("accuracy" in line and "macro F1" in line for line in said)
    assert max(map(len, said)) <= 110
    for name, domain in found["domains"].items():
        told, models = domains[name]["classes"], domain["models"]
        assert domain["bytes"] is None
        assert list(models) == ["teacher", "before", "after"]
        for model, measured in models.items():
            share = told["accuracy"][model]
            assert measured["accuracy"]["value"] == pytest.approx(share)
            error = (share * (1 - share) / (domain["documents"] - 1)) ** 0.5
            assert measured["accuracy"]["error"] == pytest.approx(error)
            assert measured["macro_f1"] == {"value": told["macro_f1"][model], "error": None}
            assert measured["ece"]["value"] == pytest.approx(told["calibration_error"][model])
        paired = domain["differences"]["after - before"]["accuracy"]["value"]
        after, before = (told["accuracy"][model] for model in ("after", "before"))
        assert paired == pytest.approx(after - before)


def test_a_run_names_the_classes_of_its_rows_in_its_config(job):
    found = yaml.safe_load((job.parent / "runs" / "kinds" / "config.yaml").read_text())
    assert tuple(found["task"]["labels"]) == LABELS == Classification(LABELS).labels

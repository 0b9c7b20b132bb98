"""A student of image and text by a user's commands: from a store, and from a teacher."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cluster.cli import main
from tests import pictured


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory) -> Path:
    """A config that has run with a teacher alone."""
    folder = tmp_path_factory.mktemp("job")
    pair = pictured.save_pair(folder)
    train = pictured.captions(folder, "train", count=24)
    valid = pictured.captions(folder, "valid", count=6, seed=5)
    config = {
        "name": "shapes",
        "steps": 6,
        "log_every": 3,
        "paths": {"runs": str(folder / "runs"), "cache": str(folder / "cache")},
        "task": "image_text",
        "teachers": {"t": {"model": str(pair.teacher), "cpus": 0.2}},
        "student": {"model": str(pair.student), "cpus": 0.2, "zero": 0},
        "domains": {"shapes": {"train": str(train), "validation": str(valid)}},
        "data": {"context": 64, "too_long": "drop"},
        "batch": {"rows_per_step": 8, "micro_batch": 4},
        "targets": {"store": str(folder / "store")},
        "losses": [{"kind": "forward_kl"}],
        "optimiser": {"lr": 1e-2},
        "checkpoints": {"every": 6},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["run", str(path), "name=live", "targets.store=null"]) == 0
    return path


@pytest.mark.drill
def test_answers_that_were_kept_teach_what_a_teacher_does(job):
    assert main(["capture", str(job)]) == 0
    assert main(["run", str(job), "targets.teacher_free=true"]) == 0
    runs = job.parent / "runs"
    live, stored = (load_file(runs / n / "export/model.safetensors") for n in ("live", "shapes"))
    assert all(bool((live[name] == stored[name]).all()) for name in live)
    for name in ("live", "shapes"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["status"] == "finished"
        shapes = summary["domains"]["shapes"]
        assert shapes["kl_after"] < shapes["kl_before"]
    assert summary["cache_hit_rate"] == 1.0


def test_eval_measures_what_follows_the_images(job, capsys):
    run = job.parent / "runs" / "live"
    shapes = json.loads((run / "summary.json").read_text())["domains"]["shapes"]
    assert main(["eval", str(run)]) == 0
    found = json.loads((run / "eval.json").read_text())["domains"]["shapes"]
    assert found["models"]["after"]["nll"]["value"] == pytest.approx(shapes["student_nll_after"])
    assert found["models"]["after"]["kl"]["value"] == pytest.approx(shapes["kl_after"], rel=1e-5)
    rows = (job.parent / "valid.jsonl").read_text().splitlines()
    assert found["bytes"] == sum(len(json.loads(row)["response"]) for row in rows)
    assert found["prompts"] == 0


@pytest.mark.drill
def test_a_probe_takes_steps_with_images(job, capsys):
    assert main(["plan", str(job), "targets.store=null", "--probe", "--json"]) == 0
    probe = json.loads(capsys.readouterr().out)["probe"]
    assert probe["student"][0]["steps"][0]["seconds"] > 0


def test_an_image_that_cannot_be_read_ends_a_run_before_it_starts(job, capsys):
    (job.parent / "torn.png").write_bytes((job.parent / "train-0-0.png").read_bytes()[:60])
    rows = (job.parent / "train.jsonl").read_text().splitlines()
    torn = json.dumps({"images": "torn.png", "prompt": "what?", "response": "red"})
    (job.parent / "torn.jsonl").write_text("\n".join([*rows, torn]) + "\n")
    train = f"domains.shapes.train={job.parent / 'torn.jsonl'}"
    assert main(["run", str(job), "name=torn", train]) == 2
    said = capsys.readouterr().err
    assert f"torn.jsonl:{len(rows) + 1}, " in said
    assert "torn.png: its image cannot be read" in said
    assert not (job.parent / "runs" / "torn" / "checkpoints").exists()

"""Two teachers through the public path: live, from a store, and from services that are up."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from shared.run.metrics import MACHINE_FIELDS, read_metrics
from shared.run.run_dir import RunDir
from shared.store.target_store import stored_answers
from tests import tiny
from tests.cluster.jobs import WORDS, write_job

TEACHERS = dict(zip(WORDS, ("wide", "narrow"), strict=True))  # by domain


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_pair) -> Path:
    """A config of two teachers of different widths, which write into a store."""
    folder = tmp_path_factory.mktemp("two")
    tiny.save_model(folder / "narrow", width=40, layers=2, seed=7)
    models = {"wide": str(tiny_pair.teacher), "narrow": str(folder / "narrow")}
    domains = {d: {"train": f"{d}.jsonl", "teacher": teacher} for d, teacher in TEACHERS.items()}
    return write_job(
        folder,
        tiny_pair,
        teachers={name: {"model": model, "cpus": 0.5} for name, model in models.items()},
        domains=domains,
        targets={"store": "store", "top_k": 16},
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, job: Path) -> Iterator[Path]:
    """A config that services which are up have taught."""
    assert main(["teacher", "up", str(job)]) == 0
    assert main(["train", str(job)]) == 0
    yield job
    for name in TEACHERS.values():
        assert main(["teacher", "down", "--service", name]) == 0


def run_of(job: Path, name: str) -> RunDir:
    return RunDir(job.parent / "runs" / name)


def lines_of(run: RunDir) -> list[dict]:
    texts = run.metrics.read_text().splitlines()
    lines = [json.loads(text) for text in texts]
    return [{k: v for k, v in line.items() if k not in MACHINE_FIELDS} for line in lines]


def same(one: RunDir, other: RunDir) -> bool:
    """Whether two runs learnt the same, to the bit."""
    weights = [(r.export / "model.safetensors").read_bytes() for r in (one, other)]
    found = [(r.path / "evaluations.json").read_text() for r in (one, other)]
    return weights[0] == weights[1] and found[0] == found[1] and lines_of(one) == lines_of(other)


def test_what_is_measured_stands_by_teacher(finished):
    run = run_of(finished, "job")
    summary = json.loads(run.summary.read_text())
    assert {t: s["domains"] for t, s in summary["teachers"].items()} == {
        teacher: [domain] for domain, teacher in TEACHERS.items()
    }
    for domain, teacher in TEACHERS.items():
        measured = summary["teachers"][teacher]
        assert measured["kl_after"] == summary["domains"][domain]["kl_after"] > 0
        assert measured["wire_bytes_per_token"] > 0
    total = sum(s["tokens"] * s["wire_bytes_per_token"] for s in summary["teachers"].values())
    assert total == pytest.approx(summary["tokens"] * summary["wire_bytes_per_token"])
    for line in read_metrics(run.metrics):
        assert sum(t.tokens for t in line.teachers.values()) == line.tokens
        assert sum(t.units for t in line.teachers.values()) == line.units
        for domain, teacher in TEACHERS.items():
            assert line.teachers[teacher].kl == pytest.approx(line.domains[domain].kl)
    assert "<h2>Teachers</h2>" in run.report.read_text()
    said = run.progress.read_text().splitlines()[-1]
    assert "wide kl " in said
    assert "narrow kl " in said


def test_each_teacher_answers_its_domains_alone_and_both_lie_in_one_store(finished):
    answers = stored_answers(finished.parent / "store")
    assert {Path(a.teacher["model"]).name for a in answers} == {"teacher", "narrow"}
    assert len(answers) == 4  # each in training and validation


@pytest.mark.drill
def test_a_store_of_both_feeds_a_run_without_any_to_the_bit(finished):
    assert main(["run", str(finished), "name=stored", "targets.teacher_free=true"]) == 0
    assert same(run_of(finished, "job"), run_of(finished, "stored"))


def test_services_are_called_as_their_teachers_or_as_the_command_says(finished, capsys):
    assert main(["teacher", "up", str(finished), "--service", "up"]) == 2
    assert "say --service wide=SERVICE,narrow=SERVICE" in capsys.readouterr().err
    swapped = ["--service", "wide=narrow,narrow=wide"]
    assert main(["train", str(finished), "name=swapped", *swapped]) == 2
    assert "teacher service narrow serves model" in capsys.readouterr().err


@pytest.mark.drill
def test_a_run_with_services_of_its_own_is_that_of_services_that_are_up(finished):
    assert main(["run", str(finished), "name=own", "targets.store=null"]) == 0
    weights = [
        (run_of(finished, name).export / "model.safetensors").read_bytes()
        for name in ("job", "own")
    ]
    assert weights[0] == weights[1]


@pytest.mark.drill
def test_an_evaluation_asks_the_services_that_it_is_told(finished):
    run = run_of(finished, "job")
    assert main(["eval", str(run.path), "--service", "wide=wide,narrow=narrow"]) == 0
    evaluated = json.loads((run.path / "evaluation.json").read_text())
    assert evaluated == json.loads((run.path / "evaluations.json").read_text())["after"]

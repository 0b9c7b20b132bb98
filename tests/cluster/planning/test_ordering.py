"""Runs through phases: rows scored by services, ordered, trained on, and without a teacher too."""

from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from cluster.planning.loading import load
from cluster.planning.preparation import prepare_run
from shared.data.row_store import RowStore
from shared.mixture.weight_log import read_log
from shared.run.metrics import read_metrics
from shared.store.target_store import stored_answers
from tests.cluster.jobs import WORDS, write_job
from tests.cluster.planning.test_difficulty import dense

PHASES = {
    "difficulty": "gap",
    "phases": 2,
    "max_steps": 2,
    "plateau": None,
    "replay": 0.25,
    "interval": 2,
}


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A finished run of two phases by the gap between student and teacher, with a store."""
    folder = tmp_path_factory.mktemp("phased")
    path = write_job(
        folder,
        tiny_pair,
        steps=6,
        mixture={"policy": "fixed"},
        progressive=PHASES,
        targets={"store": str(folder / "store"), "top_k": 16},
    )
    assert main(["run", str(path)]) == 0
    return path


def test_a_run_goes_through_its_phases(job):
    run = job.parent / "runs" / "job"
    phases = [entry.phase for entry in read_log(run / "weight_log.jsonl", WORDS).entries]
    assert phases[0] == 0
    assert phases[-1] == 1
    assert phases == sorted(phases)
    assert {line.phase for line in read_metrics(run / "metrics.jsonl")} == {0, 1}


def test_rows_are_ordered_by_the_gap_that_transformers_finds(job, tiny_pair):
    orders = [np.load(path) for path in (job.parent / "cache" / "orders").glob("*.npy")]
    domains = prepare_run(load(job, [])).domains
    assert len(orders) == len(domains)
    for domain in domains:
        folders = (tiny_pair.student, tiny_pair.teacher)
        of_student, of_teacher = (dense(folder, domain.train_path)["nll"] for folder in folders)
        gap_R = of_student - of_teacher
        sizes = [order_R for order_R in orders if len(order_R) == domain.num_rows]
        assert any((np.diff(gap_R[order_R]) > -1e-4).all() for order_R in sizes)
        assert np.ptp(gap_R) > 0.01


def test_scoring_puts_nothing_into_the_store(job):
    asks = [answers.question.ask for answers in stored_answers(job.parent / "store")]
    assert {ask.num_ids for ask in asks} == {16, 512}


def test_the_students_service_is_gone(job):
    from teacher_service.service.service import list_services

    assert list_services() == []


def test_without_a_teacher_kept_scores_serve_and_others_are_refused(job, capsys):
    capsys.readouterr()
    free = ("name=free", "targets.teacher_free=true")
    assert main(["run", str(job), *free]) == 0
    said = capsys.readouterr().out
    assert "phases by gap, cut at: letters" in said
    assert "for their difficulty" not in said, "nothing is scored twice"
    assert "loading the student" not in said
    lines = read_metrics(job.parent / "runs" / "free" / "metrics.jsonl")
    assert {line.phase for line in lines} == {0, 1}
    capsys.readouterr()
    other = ("name=entropy", "targets.teacher_free=true", "progressive.difficulty=teacher_entropy")
    assert main(["run", str(job), *other]) == 2
    said = capsys.readouterr().err
    assert "no scores by this teacher of the rows of letters" in said
    assert "progressive.difficulty=length" in said


def test_a_domain_with_fewer_rows_than_phases_is_refused_before_anything_starts(job, capsys):
    rows = min(len(RowStore.open(d.train_path)) for d in prepare_run(load(job, [])).domains)
    many = (f"progressive.phases={rows + 1}", "progressive.max_steps=1", "steps=2000")
    assert main(["run", str(job), "name=many", *many]) == 2
    assert f"too few for progressive.phases {rows + 1}" in capsys.readouterr().err

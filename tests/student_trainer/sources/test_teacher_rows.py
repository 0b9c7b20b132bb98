"""Rows that the teacher reads in place of the student's, row by row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.control.controller import Controller, ControllerPlan
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore, take_rows, write_rows
from shared.data.teacher_rows import TeacherRows
from shared.errors import DataError
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from student_trainer.ranks import Ranks
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains, ragged_rows
from tests.student_trainer.sources.test_loader import Asked, loader_of


def with_teacher_rows(
    domains: tuple[PreparedDomain, ...], folder: Path, *, count: int = 24
) -> tuple[PreparedDomain, ...]:
    """The domains with other rows, as many, for the teacher."""
    found = []
    for seed, domain in enumerate(domains):
        paths = {}
        for split, number in (("train", count), ("validation", 5)):
            paths[split] = str(folder / f"{domain.name}.{split}.teacher.arrow")
            rows = ragged_rows(50 + seed, count=number)
            write_rows(Path(paths[split]), domain=domain.name, rows=rows)
        found.append(replace(domain, teacher_paths=paths))
    return tuple(found)


def test_the_teacher_is_asked_about_its_own_row_of_every_row_of_the_student(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path
) -> None:
    domains = with_teacher_rows(prepared_domains(tmp_path), tmp_path)
    plan = plan_of(tmp_path / "run", tiny_pair, domains, student={"workers": 1})
    controller = Controller(ControllerPlan(plan.config, (0.5, 0.5), str(tmp_path / "log.jsonl")))
    reader, own = Asked(), TeacherRows.open(domains, "train")
    asking = {"reader": reader, "question": plan.training_question, "teacher_rows": own}
    loader, _ = loader_of(plan, ranks, controller, **asking)
    units = [unit for step in range(4) for unit in loader.step(step).units]
    asked = [rows for rows, _ in reader.units][: len(units)]
    assert [rows.names() for rows in asked] == [unit.names() for unit in units]
    names = [domain.name for domain in domains]
    for stores, found in (
        ([RowStore.open(d.paths["train"]) for d in domains], units),
        ([RowStore.open(d.read_by_teacher["train"]) for d in domains], asked),
    ):
        for rows in found:
            domain_R = [names.index(name) for name in rows.domains()]
            index_R = rows.table.column("index").to_pylist()
            assert take_rows(stores, domain_R, index_R).table.equals(rows.table)


def test_rows_of_the_teacher_are_asked_with_the_draws_of_the_students(
    tmp_path: Path,
) -> None:
    domains = with_teacher_rows(prepared_domains(tmp_path), tmp_path)
    own = TeacherRows.open(domains, "train")
    assert own is not None
    rows = RowStore.open(domains[0].train_path).take([3, 1]).with_draws(np.array([0, 2]))
    assert own.of(rows).draws().tolist() == [0, 2]
    assert own.of(rows).hashes() != rows.hashes()


def test_without_rows_of_its_own_a_teacher_reads_the_students(tmp_path: Path) -> None:
    domains = prepared_domains(tmp_path)
    assert TeacherRows.open(domains, "train") is None
    assert domains[0].read_by_teacher == domains[0].paths


def test_a_file_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    domains = with_teacher_rows(prepared_domains(tmp_path), tmp_path, count=23)
    with pytest.raises(DataError, match=r"has 23 rows for the teacher of domain code, whose .* 24"):
        TeacherRows.open(domains, "train")


def test_a_teacher_whose_rows_hold_the_same_tokens_teaches_the_same_bits(
    material: tuple[tiny.Pair, tuple[PreparedDomain, ...]], folder: Path
) -> None:
    pair, domains = material
    apart = tuple(replace(domain, teacher_paths=domain.paths) for domain in domains)
    for name, own in (("together", domains), ("apart", apart)):
        plan = plan_of(folder / name, pair, own)
        mark_exported(plan)
        task = {"together": "CausalLM", "apart": "Aside"}[name]
        run_jobs([as_job("tasked", plan, task=task)], folder / f"jobs-{name}")
    assert learnt(folder / "together") == learnt(folder / "apart")


def learnt(folder: Path) -> list:
    """What a run measured of its steps and of its validation text."""
    lines = read_metrics(RunDir(folder).metrics)
    assert lines
    steps = [[line.loss, line.grad_norm, line.terms, line.domains] for line in lines]
    return [*steps, (folder / "evaluations.json").read_text()]

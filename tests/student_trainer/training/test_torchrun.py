"""The trainer without Ray, from a plan file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shared.prompts.prefix import Opening
from shared.run.plan import RunPlan
from student_trainer.state.export import exported_step
from student_trainer.torchrun import read_plan, write_plan
from tests import tiny
from tests.student_trainer.runs import ROOT, plan_of, prepared_domains


def launched(plan: RunPlan, file: Path) -> subprocess.CompletedProcess:
    """One rank on a plan file."""
    write_plan(file, plan)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "student_trainer.torchrun", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def text_alone(folder: Path, pair: tiny.Pair) -> RunPlan:
    """A plan on hard labels for one worker."""
    plan = plan_of(
        folder / "run",
        pair,
        prepared_domains(folder),
        steps=2,
        student={"workers": 1, "zero": 0},
        losses=[{"kind": "cross_entropy"}],
    )
    return replace(plan, training_question=None, validation_question=None, kl_kind="none")


def test_a_plan_survives_its_file(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    plan = plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path))
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    prompted = replace(plan, openings={"code": Opening.from_lists([1], [1, 7, 9])})
    write_plan(tmp_path / "plan.json", prompted)
    read = read_plan(tmp_path / "plan.json")
    assert {name: o.to_json() for name, o in read.openings.items()} == {"code": ([1], [1, 7, 9])}
    assert replace(read, openings={}) == plan


@pytest.mark.drill
def test_a_run_on_text_alone_trains_and_ends(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    """Its export is loaded by a new Python."""
    done = launched(text_alone(tmp_path, tiny_pair), tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2 | loss " in done.stderr
    evaluations = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert (
        evaluations["after"]["code"]["student_nll"] != evaluations["before"]["code"]["student_nll"]
    )
    assert exported_step(tmp_path / "run" / "export") == 2


@pytest.mark.drill
def test_what_a_run_exported_can_be_evaluated(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    plan = text_alone(tmp_path, tiny_pair)
    launched(plan, tmp_path / "plan.json").check_returncode()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = launched(replace(plan, mode="evaluate"), tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == evaluations["after"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines

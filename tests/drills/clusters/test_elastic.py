"""Workers of a student become fewer and more, by hand and with nodes, and it learns the same."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.run.metrics import StepMetrics, read_metrics
from tests.cluster.jobs import write_job
from tests.drills.commands import Home, reached, titled, wait_until
from tests.drills.nodes import start_head, start_node
from tests.tiny import Pair

pytestmark = pytest.mark.drill

QUICK = """
from cluster.launch.students import training, workforce
from cluster.launch.students.elastic import Pace
training.PACE = workforce.PACE = Pace(look_s=0.5, steady_s=2.0, settle_s=4.0)
from cluster.cli import main
raise SystemExit(main())
"""


def job_of(folder: Path, pair: Pair, **parts: Any) -> Path:
    student = {"model": str(pair.student), "cpus": 1, "zero": 2, **parts.pop("student", {})}
    return write_job(
        folder,
        pair,
        log_every=1,
        student=student,
        batch={"rows_per_step": 8, "micro_batch": 2},
        mixture={"policy": "fixed"},
        **parts,
    )


def lines(run: Path) -> list[StepMetrics]:
    return read_metrics(run / "metrics.jsonl")


def assert_learnt_alike(run: Path, other: Path) -> None:
    """Every step once, from the same rows, with losses equal to rounding."""
    pairs = list(zip(lines(run), lines(other), strict=True))
    assert [one.step for one, _ in pairs] == list(range(1, len(pairs) + 1))
    for one, same in pairs:
        rows = [[domain.sequences for domain in line.domains.values()] for line in (one, same)]
        assert (one.tokens, rows[0]) == (same.tokens, rows[1])
        assert one.loss == pytest.approx(same.loss, rel=1e-5)


def test_a_run_goes_on_by_hand_with_another_number_of_workers(home, tmp_path, tiny_pair):
    job = job_of(tmp_path, tiny_pair, steps=40, student={"cpus": 0.25}, checkpoints={"every": 5})
    home.run("teacher", "up", str(job))
    first = home.start("train", str(job), "student.workers=1")
    run = tmp_path / "runs" / "job"
    wait_until(reached(run, 8), doing=first)
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 1, first.output
    begun = len(lines(run))
    said = home.run("train", str(job), "student.workers=2")
    assert "going on with student.workers=2 (was 1)" in said
    assert [line.workers for line in lines(run)] == [1] * begun + [2] * (40 - begun)
    home.run("train", str(job), "name=whole", "student.workers=1")
    assert_learnt_alike(run, tmp_path / "runs" / "whole")


def test_a_node_that_goes_and_comes_takes_a_worker_along(home: Home, tmp_path, tiny_pair):
    address = start_head(home, role="teacher").address
    joined = (f"--address={address}", "--num-cpus=1")
    start_node(home, *joined, role="student")
    leaves = start_node(home, *joined, role="student")
    job = job_of(tmp_path, tiny_pair, steps=200, checkpoints={"every": 10})
    elastic = "student.workers={min: 1, max: 2}"
    command = home.execute(
        sys.executable, "-c", QUICK, "run", str(job), elastic, "--address", address
    )
    run = tmp_path / "runs" / "job"
    wait_until(reached(run, 25), doing=command)
    assert "student: 2 workers, from 1 to 2" in command.output
    leaves.kill_everything()
    wait_until(lambda: "student: 2 -> 1 worker, from 1 to 2" in command.output, doing=command)
    wait_until(reached(run, 35), doing=command)
    status = json.loads(home.run("status", str(run), "--json"))
    assert status["workers"] == {"fewest": 1, "wanted": 2, "present": 1}
    (teacher,) = titled(home.processes(), "TeacherReplica")
    teacher.suspend()  # steps wait, until there is room again
    start_node(home, *joined, role="student")
    wait_until(lambda: "there is room for 2 workers" in command.output, doing=command)
    teacher.resume()
    assert command.wait() == 0, command.output
    print(command.output)
    said = command.output.splitlines()
    assert len([line for line in said if "the cluster lost the node" in line]) == 1
    (lost,) = [line for line in said if "student workers lost with node" in line]
    assert lost.startswith("1 of 2 student workers lost with node ")
    assert "; restart, from step " in lost
    (grown,) = [line for line in said if line.startswith("the student grows, from step ")]
    assert "student: 1 -> 2 workers, from 1 to 2" in said
    numbers = [line.workers for line in lines(run)]
    changes = [step for step in range(1, len(numbers)) if numbers[step] != numbers[step - 1]]
    assert [numbers[0], *(numbers[step] for step in changes)] == [2, 1, 2]
    assert all(step % 10 == 0 for step in changes)
    assert grown.endswith(f"from step {changes[1]}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"]["student_restarts"] == 1
    assert summary["failures"]["teacher_restarts"] == 0
    assert "raylet" not in command.output
    assert len([line for line in said if not line.startswith("step ")]) < 50
    home.run("run", str(job), "name=whole", "student.workers=1", "--address", address)
    assert_learnt_alike(run, tmp_path / "runs" / "whole")

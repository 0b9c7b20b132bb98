"""Where a run stands: what `tutelage status RUN` shows, of runs at work, finished and dead ones."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.report.services import (
    STALE_S,
    ReplicaStanding,
    Roll,
    ServiceStanding,
    write_roll,
)
from cluster.report.standing import Standing, read_standing
from cluster.report.text import COLUMNS
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir, locked
from student_trainer.state.checkpoint import draft_of, publish
from tests.cluster.run_dirs import LOG_EVERY, write_run

DOMAINS = ("code", "law")


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    """A run that has come to step 200 of 300."""
    write_run(tmp_path / "run", domains=DOMAINS, steps=200, finished=False)
    return RunDir(tmp_path / "run")


@pytest.mark.parametrize("damage", [b"", b'{"before": {"co', b"null", b"[]", b"5", b"\xff\xfe{}"])
@pytest.mark.parametrize(
    ("name", "verbs"),
    [("evaluations.json", ("report", "status")), ("logs/failures.json", ("status",))],
)
def test_a_damaged_file_of_a_run_is_named_by_the_verbs_that_read_it(
    run_dir, capsys, name, verbs, damage
):
    path = run_dir.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damage)
    for verb in verbs:
        assert main([verb, str(run_dir.path)]) == 2
        assert (
            f"{path} is damaged: it is no whole JSON object; put a copy" in capsys.readouterr().err
        )


def test_a_file_of_a_run_that_holds_something_else_is_named(run_dir, capsys):
    (run_dir.path / "evaluations.json").write_text('{"before": {"code": {"nll": "x", "y": 1}}}')
    assert main(["report", str(run_dir.path)]) == 2
    assert "evaluations.json is damaged: before is no evaluation" in capsys.readouterr().err


COUNTS = dict.fromkeys(COLUMNS, 1)


@pytest.mark.parametrize(
    "edited",
    [
        *(5, None, [], {}),
        *(COUNTS | more for more in ({"rows": "many"}, {"notes": 5}, {"notes": [5]})),
        *(COUNTS | {"validation": told} for told in (None, {}, COUNTS | {"notes": {}})),
    ],
)
def test_an_edited_account_of_a_runs_text_is_named(run_dir, capsys, edited):
    whole = COUNTS | {"notes": ["a"], "held_out": False, "validation": COUNTS}
    run_dir.text.write_text(json.dumps({"code": whole}))
    assert main(["report", str(run_dir.path)]) == 0
    run_dir.text.write_text(json.dumps({"code": whole, "law": edited}))
    assert main(["report", str(run_dir.path)]) == 2
    assert "text.json is damaged: law has no counts and notes of a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "edited"),
    [
        *(("summary.json", {"failures": told}) for told in (5, {}, {"teacher_restarts": "x"})),
        *(("prompts.json", {"domains": told}) for told in (5, {"code": {}}, {"code": 5})),
    ],
)
def test_an_edited_file_of_a_run_is_named_by_its_report(run_dir, capsys, name, edited):
    (run_dir.path / name).write_text(json.dumps(edited))
    assert main(["report", str(run_dir.path)]) == 2
    assert f"{name} is damaged: its " in capsys.readouterr().err


def test_a_damaged_summary_ends_no_run(run_dir):
    for damage in ("null", "[]", '{"status": '):
        run_dir.summary.write_text(damage)
        assert not run_dir.finished
        assert read_standing(run_dir)["state"] == "unfinished"


def test_numbers_are_those_of_the_metrics(run_dir):
    lines, standing = read_metrics(run_dir.metrics), read_standing(run_dir)
    assert (standing["run"], standing["step"], standing["steps"]) == ("made-up", 200, 300)
    last = lines[-1]
    assert (standing["loss"], standing["lr"], standing["grad_norm"]) == (
        last.loss,
        last.lr,
        last.grad_norm,
    )
    assert standing["tokens_per_s"] == last.tokens / last.seconds
    assert standing["teacher_wait_fraction"] == last.teacher_wait_s / last.seconds
    assert standing["seconds_per_step"] == pytest.approx(last.seconds / LOG_EVERY)
    for name in DOMAINS:
        domain = standing["domains"][name]
        assert domain["tokens"] == sum(line.domains[name].tokens for line in lines)
        assert domain["weight"] == last.domains[name].weight
        assert domain["kl"] == last.domains[name].kl
        assert domain["kl_first"] == lines[0].domains[name].kl


def test_a_run_is_no_less_far_than_its_checkpoint(run_dir):
    """Where the lines of its metrics are lost."""
    run_dir.metrics.write_bytes(b"\xff\xfe\x80\n")
    draft = draft_of(run_dir.checkpoints, 150)
    draft.mkdir(parents=True)
    (draft / "state.json").write_text("{}")
    publish(draft, step=150, keep=2)
    standing = read_standing(run_dir)
    assert (standing["step"], standing["checkpoint"]) == (150, 150)


def test_a_run_that_no_command_has_is_unfinished_or_what_its_summary_says(run_dir):
    assert read_standing(run_dir)["state"] == "unfinished"
    run_dir.summary.write_text('{"status": "interrupted"}')
    standing = read_standing(run_dir)
    assert standing["state"] == "interrupted"
    assert standing["eta_s"] is None


def test_a_run_at_work_has_an_eta_and_is_left_alone(run_dir):
    with locked(run_dir):
        standing = read_standing(run_dir)
        assert standing["state"] == "at work"
        pace_s = read_metrics(run_dir.metrics)[-1].seconds / LOG_EVERY
        assert standing["eta_s"] == pytest.approx(100 * pace_s)
    assert read_standing(run_dir)["state"] == "unfinished"


def test_what_a_dead_process_left_is_not_at_work(run_dir):
    owner = run_dir.path.parent / ".run.owner"
    owner.write_text(f"process {2**22 + 1} on {os.uname().nodename}\n")
    assert read_standing(run_dir)["state"] == "unfinished"


def test_a_run_that_has_just_begun_has_no_numbers_yet(tmp_path, capsys):
    write_run(tmp_path / "run", domains=DOMAINS, steps=0, finished=False)
    standing = read_standing(RunDir(tmp_path / "run"))
    assert standing["step"] == 0
    assert standing["loss"] is None
    assert standing["domains"] == {}
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "step 0 of 300" in capsys.readouterr().out


def test_a_run_without_a_teacher_has_no_kl(tmp_path):
    write_run(tmp_path / "run", domains=DOMAINS, steps=20, teacher=False)
    assert read_standing(RunDir(tmp_path / "run"))["domains"]["law"]["kl"] is None


def test_failures_and_the_last_line_for_people_are_told(run_dir, capsys):
    run_dir.logs.mkdir()
    (run_dir.logs / "failures.json").write_text('{"teacher_restarts": 2}')
    run_dir.progress.write_text("step 100\n" * 2000 + "step 200 | loss 1\n")
    standing = read_standing(run_dir)
    assert standing["said"] == "step 200 | loss 1"
    retried = sum(line.retried_units for line in read_metrics(run_dir.metrics))
    told = {"teacher_restarts": 2, "student_restarts": 0, "retried_units": retried}
    assert standing["failures"] == told
    assert main(["status", str(run_dir.path)]) == 0
    assert "teacher restarts 2" in capsys.readouterr().out


def test_services_are_those_that_the_driver_listed_while_it_is_at_work(run_dir, capsys):
    replica = ReplicaStanding(
        service="big", name="r-0", state="alive", units=7, tokens=9000, restarts=1
    )
    scaled = ServiceStanding(name="big", present=1, wanted=3, min=1, max=8, waiting=0.24)
    fixed = ServiceStanding(name="small", present=2, wanted=2, min=None, max=None, waiting=0.0)
    run_dir.logs.mkdir()
    write_roll(run_dir.replicas, Roll(services=[scaled, fixed], replicas=[replica]))
    assert read_standing(run_dir)["replicas"] == read_standing(run_dir)["services"] == []
    with locked(run_dir):
        assert read_standing(run_dir)["replicas"] == [replica]
        assert read_standing(run_dir)["services"] == [scaled, fixed]
        assert main(["status", str(run_dir.path)]) == 0
        old = time.time() - 2 * STALE_S
        os.utime(run_dir.replicas, (old, old))
        assert read_standing(run_dir)["replicas"] == read_standing(run_dir)["services"] == []
    lines = capsys.readouterr().out.splitlines()
    told = [line.split() for line in lines if line.startswith(("big", "small"))]
    assert told == [
        ["big", "1", "3", "1", "8", "24%"],
        ["small", "2", "2", "fixed", "fixed", "0%"],
        ["big", "r-0", "alive", "7", "9,000", "1"],
    ]


def test_workers_are_those_of_the_command_that_trains(run_dir, capsys):
    described = {"fewest": 1, "wanted": 4, "present": 2}
    run_dir.logs.mkdir()
    run_dir.workers.write_text(json.dumps(described))
    assert read_standing(run_dir)["workers"] is None
    with locked(run_dir):
        assert read_standing(run_dir)["workers"] == described
        assert main(["status", str(run_dir.path)]) == 0
    assert "workers     2 of 4 train" in capsys.readouterr().out


def test_for_programs_there_is_one_object(run_dir, capsys):
    assert main(["status", str(run_dir.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == set(Standing.__annotations__)
    assert told["replicas"] == []


def test_a_terminal_sees_the_numbers_of_each_domain(run_dir, capsys):
    assert main(["status", str(run_dir.path)]) == 0
    said = capsys.readouterr().out
    last = read_metrics(run_dir.metrics)[-1]
    assert "made-up   unfinished   step 200 of 300" in said
    assert f"loss {last.loss:.3f}" in said
    (bar,) = [line for line in said.splitlines() if "━" in line]
    assert bar.count("━") == 2 * bar.count("─")
    assert max(map(len, said.splitlines())) <= 80
    for name in DOMAINS:
        (line,) = [line for line in said.splitlines() if line.startswith(name)]
        assert f"{last.domains[name].weight:.3f}" in line
        assert f"{last.domains[name].kl:.3f}" in line


def test_watching_ends_with_the_run_and_says_what_is_new(run_dir, capsys):
    def work() -> None:
        with locked(run_dir):
            begun.set()
            time.sleep(3)
        run_dir.summary.write_text('{"status": "finished"}')

    begun, worker = threading.Event(), threading.Thread(target=work)
    worker.start()
    begun.wait()
    assert main(["status", str(run_dir.path), "--watch", "--json"]) == 0
    worker.join()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0]["state"] == "at work"
    assert told[-1]["state"] in ("unfinished", "finished")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "nowhere"], "holds no run"),
        (["status", __file__], "is a file; name the folder of a run, as runs/NAME"),
        (["status", "--watch"], "name its folder"),
        (["status", "--json"], "name its folder"),
    ],
)
def test_what_is_no_run_is_refused(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())

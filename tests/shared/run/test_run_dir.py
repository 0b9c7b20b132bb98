"""The run directory: who holds it, what continues it, and nothing is overwritten."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.config.run import Config
from shared.errors import ConfigError, RunInUseError, StorageError
from shared.run.changes import differing_options
from shared.run.environment import write_environment
from shared.run.run_dir import (
    RunDir,
    locked,
    open_run,
    write_atomically,
)

HOLD = """
import sys, time
from pathlib import Path
from shared.run.run_dir import RunDir, locked
with locked(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def config(runs: Path, **parts: object) -> Config:
    smallest = {
        "name": "x",
        "steps": 10,
        "paths": {"runs": str(runs)},
        "teachers": {"t": {"model": "a"}},
        "student": {"model": "b"},
        "domains": {"math": {"train": "m"}},
    }
    return Config.model_validate(smallest | parts)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    run_dir = RunDir(tmp_path / "x")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunInUseError, match=rf"'x' is in use by process {holder.pid}"):
        locked(run_dir).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(run_dir):
        pass


def test_the_same_config_continues_a_run(tmp_path):
    first = open_run(config(tmp_path))
    (first.checkpoints / "kept").touch()
    again = open_run(config(tmp_path, log_every=3, checkpoints={"every": 7}))
    assert (again.checkpoints / "kept").exists()
    assert again.recorded_config().log_every == 3


def test_a_config_that_learns_something_else_is_refused_with_the_option(tmp_path):
    (open_run(config(tmp_path)).checkpoints / "step").mkdir()
    values = r"other values of seed \(0, now 1\), optimiser.lr \(0.0001, now 0.01\);.*--fresh"
    with pytest.raises(ConfigError, match=values):
        open_run(config(tmp_path, seed=1, optimiser={"lr": 1e-2}))


def test_a_run_that_never_began_takes_another_config(tmp_path):
    open_run(config(tmp_path)).weight_log.write_text("the opening entry")
    again = open_run(config(tmp_path, seed=1))
    assert again.recorded_config().seed == 1
    assert not again.weight_log.exists()


def test_fresh_moves_the_old_run_aside_and_overwrites_none(tmp_path):
    for seed in range(3):
        run_dir = open_run(config(tmp_path, seed=seed), fresh=True)
        (run_dir.path / "mark").write_text(str(seed))
    assert (tmp_path / "x" / "mark").read_text() == "2"
    assert (tmp_path / "x.old-1" / "mark").read_text() == "0"
    assert (tmp_path / "x.old-2" / "mark").read_text() == "1"


def test_a_changed_kind_and_a_removed_domain_differ(tmp_path):
    before = config(tmp_path, domains={"math": {"train": "m"}, "code": {"train": "c"}})
    after = config(tmp_path, mixture={"policy": "ddk"})
    differing = differing_options(before, after)
    assert "mixture.policy" in differing
    assert "domains.code.train" in differing


def test_options_of_a_group_that_was_empty_are_named_alone(tmp_path):
    before = config(tmp_path, domains={"math": {"train": "m"}})
    after = config(tmp_path, domains={"math": {"train": "m", "columns": {"text": "body"}}})
    assert [*differing_options(before, after)] == ["domains.math.columns.text"]
    assert [*differing_options(after, before)] == ["domains.math.columns.text"]


def test_a_job_takes_its_folder_to_another_place_each_time(tmp_path):
    def job(copy: str, text: str) -> Config:
        folder = f"/tmp/ray/{copy}/runtime_resources/working_dir_files/_ray_pkg_{copy}"
        texts = [f"{folder}/{text}", {"dataset": f"{folder}/b"}]
        return config(
            tmp_path,
            teachers={"t": {"model": f"{folder}/models/t"}},
            domains={"math": {"train": texts}, "code": {"train": "/mnt/c"}},
        )

    assert differing_options(job("1", "a"), job("2", "a")) == {}
    assert [*differing_options(job("1", "a"), job("2", "x"))] == ["domains.math.train"]


@pytest.mark.parametrize(
    ("option", "value", "passes"),
    [
        ("paths.cache", "elsewhere", True),
        ("log_every", 3, True),
        ("checkpoints.every", 7, True),
        ("checkpoints.keep", 7, True),
        ("service.in_flight", 7, True),
        ("service.max_unit_failures", 7, True),
        ("baseline", True, True),
        ("student.max_restarts", 7, True),
        ("student.cpus", 7.0, True),
        ("teachers.t.replicas", 7, True),
        ("teachers.t.replicas", {"min": 2, "max": 7}, True),
        ("teachers.t.cpus", 7.0, True),
        ("targets.ids", "plain", True),
        ("targets.store", "store", True),
        ("targets.store_ids", "plain", True),
        ("prompt_search.rounds", 7, True),
        ("steps", 7, True),
        ("student.zero", 3, True),
        ("student.workers", 2, True),
        ("student.gpus", 1.0, True),
        ("student.activation_checkpointing", True, True),
        ("student.attention", "eager", False),
        ("teachers.t.gpus", 1.0, True),
        ("teachers.t.dtype", "bfloat16", False),
        ("batch.micro_batch", 1, True),
        ("batch.rows_per_step", 16, False),
        ("targets.top_k", 7, False),
        ("targets.seed", 7, False),
        ("optimiser.clip_norm", None, False),
        ("data.context", 64, False),
        ("evaluation.kl", "full", False),
    ],
)
def test_what_decides_nothing_about_the_student_may_change(tmp_path, option, value, passes):
    before = config(tmp_path)
    fields = before.model_dump()
    *sections, leaf = option.split(".")
    place = fields
    for section in sections:
        place = place[section]
    place[leaf] = value
    after = type(before).model_validate(fields)
    assert [*differing_options(before, after)] == ([] if passes else [option])


def test_how_many_copies_write_may_change_and_not_what_draws(tmp_path):
    """One engine's draws are not another's."""

    def written(**rollouts: object) -> Config:
        return config(tmp_path, source="student", rollouts=rollouts)

    vllm = {"replicas": 1, "engine": "vllm", "python": "/p"}
    before = written(**vllm)
    others = {"replicas": 3, "gpus": 1.0, "cpus": 0.5, "python": "/q"}
    assert differing_options(before, written(**vllm | others)) == {}
    assert differing_options(written(), written(replicas=2)) == {}
    assert [*differing_options(written(), before)] == ["rollouts.engine"]


def test_a_long_value_is_shown_where_it_differs(tmp_path):
    losses = [{"kind": kind} for kind in ("forward_kl", "reverse_kl", "jsd")]
    other = [*losses[:2], {"kind": "jsd", "beta": 0.25}]
    (open_run(config(tmp_path, losses=losses)).checkpoints / "step").mkdir()
    with pytest.raises(ConfigError) as refusal:
        open_run(config(tmp_path, losses=other))
    before, after = str(refusal.value).split(", now ")
    assert '"beta": 0.5' in before
    assert '"beta": 0.25' in after
    assert len(before + after) < 350


def test_the_decisions_of_phases_stay_where_they_are(tmp_path):
    phased = {"mixture": {"policy": "fixed"}, "progressive": {"plateau": None, "max_steps": 50}}
    before, longer = (config(tmp_path, steps=steps, **phased) for steps in (300, 600))
    assert before.decision_interval != longer.decision_interval
    expected = (before.decision_interval, longer.decision_interval)
    assert differing_options(before, longer) == {"progressive.interval": expected}
    phased["progressive"]["interval"] = before.decision_interval
    assert differing_options(before, config(tmp_path, steps=600, **phased)) == {}


def test_a_run_is_finished_when_its_summary_says_so(tmp_path):
    run_dir = open_run(config(tmp_path))
    assert not run_dir.finished
    run_dir.summary.write_text(json.dumps({"status": "interrupted"}))
    assert not run_dir.finished
    run_dir.summary.write_text(json.dumps({"status": "finished"}))
    assert run_dir.finished


def test_attempts_are_numbered(tmp_path):
    run_dir = open_run(config(tmp_path))
    assert [run_dir.new_attempt().name for _ in range(2)] == ["attempt-1", "attempt-2"]
    (run_dir.logs / "attempt-1").rmdir()
    assert run_dir.new_attempt().name == "attempt-3"


def test_a_write_that_fails_keeps_the_old_file_and_says_why(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomically(tmp_path / "absent" / "f", "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_write_that_is_interrupted_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def interrupted(file: int) -> None:
        raise KeyboardInterrupt

    write_atomically(tmp_path / "f", "old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_environment_file_holds_versions_and_no_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_dir = open_run(config(tmp_path))
    write_environment(run_dir, cluster={"CPU": 2.0, "node:1.2.3.4": 1.0})
    text = run_dir.environment.read_text()
    assert json.loads(text)["packages"]["pydantic"]
    assert json.loads(text)["cluster"] == {"CPU": 2.0}
    assert "hf_secret" not in text

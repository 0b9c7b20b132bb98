"""The main job through the public path: what it leaves behind, and that it continues."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.launch.driver import on_hard_labels, run_dir_of
from shared.config.file import dump, load_config, resolve
from shared.mixture.weight_log import read_log
from shared.run import exported
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from shared.run.start import STAGES
from student_trainer.state.checkpoint import all_checkpoints, step_of
from student_trainer.state.export import exported_step
from tests import signals
from tests.cluster.jobs import WORDS, with_all_that_is_exported, write_job
from tests.scraping import Scrapes, export_url, scraping

ROOT = Path(__file__).resolve().parents[3]
SUMMARY = {
    "status",
    "steps",
    "tokens",
    "tokens_per_s",
    "teacher_wait_fraction",
    "wire_bytes_per_token",
    "cache_hit_rate",
    "captured_mass",
    "phases",
    "domains",
    "teachers",
    "failures",
    "start",
}


@pytest.fixture(scope="module")
def watched(ray_cluster, tmp_path_factory, tiny_pair) -> tuple[Path, Scrapes, str]:
    """A config whose run has finished, with a baseline, a store, a weighting and experts; what it
    exported meanwhile, and what it said."""
    import ray

    parts = with_all_that_is_exported(tiny_pair)
    job = write_job(tmp_path_factory.mktemp("job"), tiny_pair, baseline=True, **parts)
    said = io.StringIO()
    with scraping(export_url(ray.nodes()[0])) as scrapes, redirect_stdout(said):
        assert main(["run", str(job)]) == 0
    return job, scrapes, said.getvalue()


@pytest.fixture(scope="module")
def finished(watched: tuple[Path, Scrapes, str]) -> Path:
    """Its config."""
    return watched[0]


@pytest.fixture
def run_dir(finished: Path) -> RunDir:
    return RunDir(finished.parent / "runs" / "job")


def test_a_run_leaves_everything_behind(run_dir):
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "weight_log.jsonl",
        "checkpoints",
        "export",
        "report.html",
        "logs",
        "summary.json",
        "baseline.json",
    }
    assert expected <= {path.name for path in run_dir.path.iterdir()}


def test_what_is_known_of_the_text_and_what_a_run_does_unasked_is_said_first(watched, run_dir):
    *_, said = watched
    before = said.partition("step 2/6")[0]
    assert before != said
    header, letters, *_ = before[before.index("domain ") :].splitlines()
    assert header.split()[:3] == ["domain", "documents", "rows"]
    assert letters.split()[:2] == ["letters", "60"]
    assert "router_balance 0.01: the student's routers learn" in before
    text = json.loads(run_dir.summary.read_text())["domains"]["letters"]["text"]
    assert text["documents"] == 60


def test_a_teacher_that_is_no_better_than_the_student_is_named_before_the_first_step(run_dir):
    evaluated = json.loads((run_dir.path / "evaluations.json").read_text())["before"]
    before = (run_dir.path / "logs" / "progress.log").read_text().partition("step 2/6")[0]
    weak = {name for name, d in evaluated.items() if d["teacher_nll"] >= d["student_nll"]}
    told = re.findall(r"the teacher tiny is no better .* text of (\w+) before training", before)
    assert set(told) == weak != set()


def test_a_centre_of_all_rows_is_scored_before_the_run(finished, run_dir):
    """Nothing stands in for it: without, the first step would have failed."""
    config = resolve(load_config(finished))
    kept = list((Path(config.paths.cache) / "difficulty").glob("*.json"))
    assert len(kept) == len(config.domains)
    assert read_metrics(run_dir.metrics)[-1].step == config.steps


def test_what_is_exported_is_what_metrics_jsonl_says(watched, run_dir):
    _, scrapes, _ = watched
    lines = read_metrics(run_dir.metrics)
    assert scrapes.of(exported.LOSS, run="job")[-1] == pytest.approx(lines[-1].loss)
    assert scrapes.of(exported.STEP, run="job")[-1] == 6
    assert scrapes.of(exported.PROGRESS, run="job")[-1] == 1
    assert scrapes.of(exported.ETA, run="job")[-1] == 0
    for name, domain in lines[-1].domains.items():
        assert scrapes.of(exported.KL, run="job", domain=name)[-1] == pytest.approx(domain.kl)
        assert scrapes.of(exported.WEIGHT, run="job", domain=name)[-1] == domain.weight
        learnt = sum(line.domains[name].tokens for line in lines)
        assert scrapes.of(exported.TOKENS, run="job", domain=name)[-1] == learnt
    parts = (
        exported.STEP_WAIT,
        exported.STEP_COMPUTE,
        exported.STEP_OPTIMISER,
        exported.STEP_REST,
    )
    seconds = [scrapes.of(part, run="job")[-1] for part in parts]
    assert sum(seconds) == pytest.approx(lines[-1].seconds / 2)
    assert all(part > 0 for part in seconds)
    assert scrapes.of(exported.STEP_WRITING, run="job")[-1] == 0
    baseline = read_metrics(run_dir.baseline.metrics)
    assert scrapes.of(exported.LOSS, run="job/baseline")[-1] == pytest.approx(baseline[-1].loss)


def test_everything_that_is_defined_is_exported(watched):
    _, scrapes, _ = watched
    assert scrapes.helps == {m.exported: m.description for m in exported.METRICS}


def test_the_summary_has_the_agreed_names(run_dir):
    summary = json.loads(run_dir.summary.read_text())
    assert set(summary) == SUMMARY
    assert summary["status"] == "finished"
    assert summary["steps"] == 6
    assert summary["failures"] == {
        "teacher_restarts": 0,
        "student_restarts": 0,
        "retried_units": 0,
    }
    for domain in summary["domains"].values():
        assert domain["kl_kind"] == "full"
        assert domain["kl_after"] > 0


def test_the_summary_says_what_the_start_took_by_stage(run_dir):
    start = json.loads(run_dir.summary.read_text())["start"]
    assert set(start) == set(STAGES)
    assert 0 < start["first_step"] < start["total"]
    in_turn = ("imports", "prepare", "cluster", "first_step")
    assert sum(start[stage] for stage in in_turn) <= start["total"] + 0.1
    assert start["workers"] + start["student"] <= start["total"]


def test_a_teacher_that_a_replica_refuses_ends_the_students_that_wait(
    ray_cluster, tmp_path, tiny_pair, capsys
):
    """Its files are whole and of the right sizes, and their values are no numbers."""
    import ray

    free = ray.available_resources()["CPU"]
    teacher = shutil.copytree(tiny_pair.teacher, tmp_path / "broken")
    path = teacher / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    job = write_job(tmp_path, tiny_pair, teachers={"tiny": {"model": str(teacher), "cpus": 0.5}})
    assert main(["run", str(job)]) == 2
    assert "are not finite in float32" in capsys.readouterr().err
    deadline = time.monotonic() + 30
    while ray.available_resources()["CPU"] < free and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == free


def test_the_baseline_drew_the_same_rows(run_dir):
    def rows(folder: RunDir) -> list[dict[str, tuple[int, int]]]:
        lines = read_metrics(folder.metrics)
        return [{n: (d.sequences, d.tokens) for n, d in line.domains.items()} for line in lines]

    assert rows(run_dir) == rows(run_dir.baseline)
    assert read_log(run_dir.weight_log, WORDS) == read_log(run_dir.baseline.weight_log, WORDS)


def test_the_baseline_is_a_run_directory_that_commands_find(run_dir, tmp_path):
    config = run_dir.baseline.recorded_config()
    assert run_dir_of(config).path == run_dir.baseline.path
    assert main(["export", str(run_dir.baseline.path), "--to", str(tmp_path / "hard")]) == 0
    exports = (run_dir.baseline.export, run_dir.export)
    weights = [(folder / "model.safetensors").read_bytes() for folder in exports]
    assert (tmp_path / "hard" / "model.safetensors").read_bytes() == weights[0] != weights[1]


def test_an_export_that_lost_its_weights_is_made_again(finished, run_dir):
    before = (run_dir.export / "model.safetensors").read_bytes()
    (run_dir.export / "model.safetensors").unlink()
    assert main(["export", str(run_dir.path)]) == 0
    assert (run_dir.export / "model.safetensors").read_bytes() == before


def test_a_finished_run_says_so_and_changes_nothing(finished, run_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*.json*")}
    assert main(["run", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "job is finished" in said
    assert "letters" in said
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*.json*")}


def test_another_objective_under_the_same_name_is_refused(finished, capsys):
    assert main(["run", str(finished), "optimiser.lr=1e-4"]) == 2
    assert "other values of optimiser.lr" in capsys.readouterr().err


@pytest.mark.drill
def test_a_finished_run_goes_on_with_more_steps_and_cut_otherwise(
    finished, run_dir, tmp_path, capsys
):
    config = run_dir.recorded_config()
    steps, zero = config.steps, (config.student.zero + 1) % 4
    shutil.copytree(run_dir.path, tmp_path / "job")
    grown = RunDir(tmp_path / "job")
    again = ["run", str(finished), f"paths.runs={tmp_path}", "batch.micro_batch=1"]
    assert main([*again, f"steps={steps + 2}", f"student.zero={zero}"]) == 0
    said = capsys.readouterr().out
    assert f"steps={steps + 2} (was {steps})" in said
    assert f"student.zero={zero} (was {config.student.zero})" in said
    assert f"spans {steps + 2} steps in place of {steps}: step {steps + 1} takes" in said
    assert f"going on from step {steps} of {steps + 2}" in said
    for run in (grown, grown.baseline):
        summary = json.loads(run.summary.read_text())
        assert (summary["status"], summary["steps"]) == ("finished", steps + 2)
        assert exported_step(run.export) == steps + 2
    assert main([*again, f"steps={steps}"]) == 2
    assert f"steps is {steps}, but {steps + 2} steps of this run are done" in (
        capsys.readouterr().err
    )


def test_the_export_goes_to_a_new_folder(finished, run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir.path), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["export", str(run_dir.path), "--to", str(tmp_path / "out")]) == 2


def test_a_report_is_written_again(finished, run_dir, capsys):
    run_dir.report.unlink()
    assert main(["report", str(run_dir.path)]) == 0
    assert run_dir.report.exists()
    assert "teacher" in capsys.readouterr().out


@pytest.mark.drill
def test_an_evaluation_finds_what_the_run_ended_with(finished, run_dir, capsys):
    assert main(["eval", str(run_dir.path)]) == 0
    found = json.loads((run_dir.path / "evaluation.json").read_text())
    after = json.loads((run_dir.path / "evaluations.json").read_text())["after"]
    for name, domain in after.items():
        assert found[name]["kl"] == pytest.approx(domain["kl"], abs=1e-6)
        assert found[name]["student_nll"] == pytest.approx(domain["student_nll"], abs=1e-6)


def test_no_service_and_no_controller_is_left(finished):
    import ray

    from teacher_service.service.service import list_services

    assert list_services() == []
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert not any(name.startswith("controller(") for name in names)


def test_a_store_filled_by_one_run_feeds_another_without_a_teacher(finished, run_dir, capfd):
    """Also one that a signal stops between two checkpoints, with a line for every step: the step
    under way is saved, and the same command goes on from it."""
    options = ["name=stopped", "baseline=false", "targets.teacher_free=true", "log_every=1"]
    command = ["run", str(finished), *options, "checkpoints.every=100"]
    stopped = RunDir(finished.parent / "runs" / "stopped")

    def stop() -> None:
        while not stopped.metrics.exists():
            time.sleep(0.005)
        signals.send(signal.SIGTERM)

    sender = threading.Thread(target=stop, daemon=True)
    sender.start()
    assert main(command) == 1
    sender.join()
    said = capfd.readouterr().err
    (checkpoint,) = all_checkpoints(stopped.checkpoints)
    step = step_of(checkpoint)
    assert step in range(1, 6)
    assert "SIGTERM: the step under way is finished and saved" in said
    assert f"Stopped after step {step} of 6, which is saved; the same command continues" in said
    assert json.loads(stopped.summary.read_text())["status"] == "interrupted"
    assert not stopped.stop_request.exists()
    assert not stopped.stepping.exists()

    assert main(command) == 0
    assert f"going on from step {step} of 6" in capfd.readouterr().out
    steps = [json.loads(line)["step"] for line in stopped.metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    rates = [json.loads(r.summary.read_text())["cache_hit_rate"] for r in (run_dir, stopped)]
    assert rates == [0.0, 1.0]
    weights = [(r.export / "model.safetensors").read_bytes() for r in (run_dir, stopped)]
    assert weights[0] == weights[1]


@pytest.mark.drill
def test_two_lifetimes(ray_cluster, tmp_path, tiny_pair, capsys):
    job = write_job(tmp_path, tiny_pair)
    assert main(["train", str(job)]) == 2  # no service yet
    assert main(["teacher", "up", str(job)]) == 0
    assert main(["teacher", "up", str(job)]) == 0
    assert main(["train", str(job)]) == 0
    assert main(["teacher", "scale", "2"]) == 0
    assert "1 -> 2 replicas" in capsys.readouterr().out
    assert main(["teacher", "up", str(job)]) == 0
    assert "keeps its 2 replicas, more than the 1 asked for" in capsys.readouterr().out
    assert main(["teacher", "up", str(job), "teachers.tiny.replicas=3"]) == 0
    assert "2 -> 3 replicas" in capsys.readouterr().out
    assert main(["teacher", "scale", "2"]) == 0
    assert main(["teacher", "status"]) == 0
    assert capsys.readouterr().out.count("alive") == 2
    assert main(["teacher", "down"]) == 0
    assert main(["teacher", "down"]) == 2
    assert RunDir(tmp_path / "runs" / "job").finished


@pytest.mark.drill
def test_a_run_killed_whole_continues_to_the_same_end(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair, steps=20, log_every=1)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}

    def command(name: str) -> list[str]:
        local = ["--address", "local"]
        return [sys.executable, "-m", "cluster", "run", str(job), f"name={name}", *local]

    subprocess.run(command("whole"), cwd=ROOT, env=environment, check=True, timeout=500)
    with subprocess.Popen(command("killed"), cwd=ROOT, env=environment) as driver:
        progress = tmp_path / "runs" / "killed" / "logs" / "progress.log"
        deadline = time.monotonic() + 400
        while not (progress.exists() and "step 7/" in progress.read_text()):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.1)
        driver.send_signal(signal.SIGKILL)
    assert not RunDir(tmp_path / "runs" / "killed").finished
    subprocess.run(command("killed"), cwd=ROOT, env=environment, check=True, timeout=500)
    whole, killed = (RunDir(tmp_path / "runs" / name) for name in ("whole", "killed"))
    weights = [(r.export / "model.safetensors").read_bytes() for r in (whole, killed)]
    assert weights[0] == weights[1]
    assert whole.weight_log.read_text() == killed.weight_log.read_text()
    assert [line.loss for line in read_metrics(whole.metrics)] == [
        line.loss for line in read_metrics(killed.metrics)
    ]


def test_a_copy_on_hard_labels_has_a_config_that_can_be_read_again(tmp_path, tiny_pair):
    losses, targets = [{"kind": "reverse_kl"}], {"student_ids": 16}
    config = load_config(write_job(tmp_path, tiny_pair, losses=losses, targets=targets))
    (tmp_path / "hard.yaml").write_text(dump(on_hard_labels(config)))
    again = load_config(tmp_path / "hard.yaml")
    assert [loss.kind for loss in again.losses] == ["cross_entropy"]
    assert again.targets.student_ids == 0

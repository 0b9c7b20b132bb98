"""Bad input: one sentence, no traceback, exit code 2, nothing started and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.session import ray_head
from cluster.session.session import not_started
from shared.config.file import dump, load_config, resolve
from shared.run.run_dir import RunDir, locked
from tests import tiny
from tests.cluster.jobs import write_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path, tiny_pair, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return write_job(tmp_path, tiny_pair)


@pytest.fixture
def refused(capsys, monkeypatch, job):
    """Run a command that must be refused before any cluster; returns the sentence."""

    def no_cluster(*_: object, **__: object) -> None:
        raise AssertionError("a cluster was started for input that cannot work")

    monkeypatch.setattr("cluster.launch.driver.connected", no_cluster)

    def refuse(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err.strip()
        assert "Traceback" not in said
        assert "\n" not in said
        assert not (job.parent / "runs" / "job" / "config.yaml").exists()
        return said

    return refuse


def test_a_misspelt_key_is_named_with_file_line_and_nearest_match(refused, job):
    job.write_text(job.read_text() + "optimizer: {lr: 1e-4}\n")
    line = len(job.read_text().splitlines())
    expected = f"optimizer is not an option. Did you mean optimiser? ({job}, line {line})"
    assert refused("run", str(job)) == f"ConfigError: {expected}"


def test_a_wrong_type_is_named_with_its_value(refused, job):
    assert "steps is 'many'" in refused("run", str(job), "steps=many")


def test_a_missing_config_file_is_named(refused, tmp_path):
    said = refused("run", str(absent := tmp_path / "absent.yaml"))
    assert f"{absent} cannot be read: No such file" in said
    assert said.endswith(f"`tutelage init {absent}` writes a first one")


def test_a_missing_text_file_is_named_with_its_option(refused, job):
    said = refused("run", str(job), "domains.letters.train=absent.jsonl")
    assert "domains.letters.train is 'absent.jsonl'" in said


def test_an_empty_domain_is_named(refused, job):
    (job.parent / "letters.jsonl").write_text("")
    assert "letters" in refused("run", str(job))


def test_a_row_that_is_no_json_is_named_with_file_and_line(refused, job):
    with (job.parent / "letters.jsonl").open("a") as file:
        file.write('{"text": \n')
    said = refused("run", str(job))
    assert "letters.jsonl" in said
    assert "61" in said


def test_text_longer_than_the_context_is_refused_when_asked(refused, job):
    said = refused("run", str(job), "data.too_long=refuse")
    assert "data.too_long" in said or "context" in said


def test_models_with_different_tokenizers_are_refused_with_the_first_id(
    refused, job, tmp_path, tiny_pair
):
    other = tmp_path / "other"
    shutil.copytree(tiny_pair.student, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    swapped = {i: token for token, i in vocabulary.items() if i in (40, 41)}
    vocabulary[swapped[40]], vocabulary[swapped[41]] = 41, 40
    path.write_text(json.dumps(tokenizer))
    said = refused("run", str(job), f"student.model={other}")
    assert "do not share a vocabulary: id 40" in said


def test_padding_rows_alone_are_no_difference(job, tmp_path, tiny_pair):
    from cluster.planning.handshake import shake_hands
    from shared.config.file import load_config, resolve

    padded = tmp_path / "padded"
    shutil.copytree(tiny_pair.teacher, padded)
    tiny.edit_config(padded, vocab_size=tiny.VOCAB + 64)
    config = resolve(load_config(job, [f"teachers.tiny.model={padded}"]))
    (teacher,) = shake_hands(config).teachers.values()
    assert teacher.shared_vocab == tiny.VOCAB


@pytest.mark.parametrize("option", ["teachers.tiny.model", "student.model"])
def test_a_model_folder_without_weights_is_named(refused, job, tmp_path, tiny_pair, option):
    empty = tmp_path / "empty"
    shutil.copytree(tiny_pair.student, empty)
    (empty / "model.safetensors").unlink()
    said = refused("run", str(job), f"{option}={empty}")
    assert f"{option} is {empty}, a folder without weights" in said


def test_more_ids_than_the_vocabulary_are_refused(refused, job):
    said = refused("run", str(job), "targets.top_k=513")
    assert "targets.top_k is 513, but teacher and student share 512 tokens" in said


def test_a_context_longer_than_a_models_is_refused(refused, job):
    assert "reads at most 128 tokens" in refused("run", str(job), "data.context=129")


def test_a_run_in_use_is_refused(job, capsys):
    with locked(RunDir(job.parent / "runs" / "job")):
        assert main(["run", str(job)]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_more_workers_than_the_cluster_has_are_refused(ray_cluster, job, capsys):
    overrides = ["student.workers=32", "batch.rows_per_step=64", "student.cpus=1"]
    started = time.monotonic()
    assert main(["run", str(job), *overrides]) == 2
    assert time.monotonic() - started < 60
    assert "no room for the student's workers" in capsys.readouterr().err
    assert nothing_is_left_of(job)


def test_a_refused_request_does_not_stand_in_the_way_of_the_next(ray_cluster, job, capsys):
    assert main(["run", str(job), "teachers.tiny.gpus=64", "seed=1"]) == 2
    assert main(["run", str(job), "teachers.tiny.gpus=64", "seed=2"]) == 2
    assert "other values" not in capsys.readouterr().err


def test_gpus_the_cluster_lacks_are_refused(ray_cluster, job, capsys):
    assert main(["run", str(job), "teachers.tiny.gpus=64"]) == 2
    assert "64 GPU" in capsys.readouterr().err
    assert nothing_is_left_of(job)


def nothing_is_left_of(job: Path) -> bool:
    """No folder of the run, no lock, and no rows."""
    return not (job.parent / "runs").exists() and not list(job.parent.rglob("*.arrow"))


def test_an_address_that_does_not_answer_is_refused_before_any_work(refused, job):
    said = refused("run", str(job), "--address", "127.0.0.1:9")
    assert "no Ray cluster answers at 127.0.0.1:9" in said
    assert not (job.parent / "cache").exists()


def test_a_service_that_does_not_run_is_refused_before_any_work(ray_cluster, job, capsys):
    assert main(["train", str(job), "--service", "absent"]) == 2
    assert "no teacher service named absent is running" in capsys.readouterr().err
    assert not (job.parent / "runs" / "job" / "config.yaml").exists()


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tutelage {version('tutelage')}"


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["run"], ["run", "--bogus"], ["teacher", "scale", "many"]]
)
def test_a_mistaken_command_line_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unforeseen_error_is_one_sentence_and_a_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("cluster.commands.runs.init", lambda to, recipe: 1 / 0)
    assert main(["init"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (log,) = (tmp_path / "tutelage" / "logs").iterdir()
    assert str(log) in said
    assert "ZeroDivisionError" in log.read_text()


def test_ctrl_c_exits_with_1_and_says_so(monkeypatch, capsys):
    def interrupted(to: Path, recipe: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.commands.runs.init", interrupted)
    assert main(["init"]) == 1
    assert capsys.readouterr().err == "Interrupted; the same command starts again.\n"


def test_every_command_is_listed_with_a_whole_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["teacher"], ["prompts"], ["cache"], ["jobs"], ["monitor"]):
        assert main([*group, "--help"]) == 0
        commands = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
        assert commands
        assert not [line for line in commands if line.endswith("...")]


def test_help_is_quick():
    started = time.monotonic()
    command = [sys.executable, "-m", "cluster", "--help"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "teacher" in outcome.stdout
    assert time.monotonic() - started < 15  # 0.4 s on an idle machine, 15 with Ray and torch


@pytest.mark.parametrize(("asked", "code"), [("--help", 0), ("nonsense", 2)])
def test_a_command_ends_with_its_code_and_all_that_was_registered_but_clears_no_module(asked, code):
    """To clear the modules of Ray away takes a second or more."""
    script = f"""
import sys

import cluster.__main__ as command

import atexit


class Module:
    def __del__(self):
        print("cleared away")


sys.kept = Module()
atexit.register(print, "registered")
sys.argv = ["tutelage", {asked!r}]
sys.exit(command.program())
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    assert found.stdout.splitlines()[-1] == "registered"
    if code:
        assert "nonsense" in found.stderr


def test_status_works_without_a_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["status", "--runs", str(tmp_path)]) == 0
    assert "none is running here" in capsys.readouterr().out


@pytest.mark.parametrize(("layers", "role"), [("{99: 1}", "teacher"), ("{1: 99}", "student")])
def test_layers_that_a_model_lacks_are_refused_before_anything_starts(refused, job, layers, role):
    said = refused("run", str(job), f"losses=[{{kind: hidden_states, layers: {layers}}}]")
    assert f"{role} layer 99, but the {role} has layers 0 to" in said


def test_init_into_a_folder_that_does_not_exist_is_refused(refused, tmp_path):
    assert "no such file or directory" in refused("init", str(tmp_path / "absent" / "x.yaml"))


@pytest.mark.parametrize("inside", ["", "deeper/still"])
@pytest.mark.parametrize("option", ["paths.runs", "paths.cache", "targets.store"])
def test_a_folder_of_the_config_that_is_a_file_is_named(refused, job, tmp_path, option, inside):
    (tmp_path / "taken").write_text("")
    said = refused("run", str(job), f"{option}={tmp_path / 'taken' / inside}")
    assert option in said
    assert str(tmp_path / "taken") in said
    assert "fault" not in said


@pytest.mark.parametrize("option", ["paths.runs", "paths.cache", "targets.store"])
def test_a_folder_of_the_config_that_nobody_may_make_is_named(refused, job, option):
    """Of the kernel, which not even root writes to."""
    said = refused("run", str(job), f"{option}=/sys/tutelage/inside")
    assert option in said
    assert "/sys" in said


def test_a_name_too_long_for_a_file_is_named(refused, job):
    assert "name is 'nnnn" in refused("run", str(job), f"name={'n' * 300}")


def test_a_path_too_long_for_the_system_is_named(refused, job):
    said = refused("run", str(job), f"teachers.tiny.model={'m' * 300}")
    assert "file name too long" in said


@pytest.mark.parametrize("number", ["1.0", "1.5", "-0.1"])
def test_a_momentum_that_no_optimiser_takes_is_named(refused, job, number):
    assert "optimiser.betas.0 is" in refused("run", str(job), f"optimiser.betas=[{number}, 0.9]")


@pytest.mark.parametrize("option", ["seed", "targets.seed"])
def test_a_seed_that_no_generator_takes_is_named(refused, job, option):
    assert f"{option} is 9223372036854775808" in refused("run", str(job), f"{option}={2**63}")


def test_a_warm_up_that_the_run_ends_in_is_refused(refused, job):
    said = refused("run", str(job), "steps=50", "optimiser.warmup_steps=100")
    assert "optimiser.warmup_steps is 100, but the run has 50 steps" in said
    assert "would reach 0.0015 of optimiser.lr 0.003" in said


def test_what_no_machine_has_is_refused_before_rows_are_made_and_leaves_nothing(refused, job):
    before = sorted(job.parent.rglob("*"))
    said = refused("run", str(job), "teachers.tiny.replicas=3", "teachers.tiny.cpus=1000")
    assert "no room for the teacher's replicas: all together ask for 3000.5 CPU" in said
    assert "the cluster of 1 node has" in said
    assert sorted(job.parent.rglob("*")) == before


@pytest.mark.parametrize("command", [["capture"], ["selftest"], ["prompts", "optimise"], ["eval"]])
def test_every_command_refuses_what_no_machine_has_before_rows_are_made(refused, job, command):
    asked = ["targets.store=store", "teachers.tiny.cpus=1000"]
    given = [str(job), *asked]
    if command == ["eval"]:
        run = job.parent / "done" / "job"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump(resolve(load_config(job, asked))))
        given = [str(run)]
    said = refused(*command, *given)
    assert "no room for the teacher's replicas" in said
    assert not list(job.parent.rglob("*.arrow"))


def test_a_service_that_no_machine_has_room_for_leaves_no_cluster(refused, job):
    said = refused("teacher", "up", str(job), "teachers.tiny.cpus=1000", "--address", "local")
    assert "no room for the teacher's replicas" in said
    assert ray_head.remembered() is None


def test_a_template_that_raises_is_named_with_the_row(refused, job, tmp_path, tiny_pair):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "letters.jsonl").write_text(json.dumps(row) + "\n")
    models = {}
    for role, folder in (("teachers.tiny", tiny_pair.teacher), ("student", tiny_pair.student)):
        models[role] = tmp_path / role
        shutil.copytree(folder, models[role])
        (models[role] / "chat_template.jinja").write_text("{{ messages[0]['content'] + 1 }}")
    said = refused("run", str(job), *(f"{role}.model={path}" for role, path in models.items()))
    assert "letters.jsonl" in said
    assert "can only concatenate str" in said


def test_an_export_that_cannot_be_written_is_named(job, tmp_path, capsys):
    run = tmp_path / "runs" / "job"
    run.mkdir(parents=True)
    config = resolve(load_config(job))
    (run / "config.yaml").write_text(dump(config))
    (tmp_path / "taken").write_text("")
    for to in (tmp_path / "taken", tmp_path / "taken" / "inside", tmp_path / ("e" * 300)):
        assert main(["export", str(run), "--to", str(to)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(("ConfigError: --to is", f"ConfigError: {to} exists"))


def test_any_other_error_of_the_operating_system_is_a_sentence(tmp_path, capsys):
    assert main(["report", str(tmp_path / ("r" * 300))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("StorageError: ")
    assert "file name too long" in said
    assert len(said) < 300


def test_a_cluster_that_does_not_start_is_a_sentence_that_says_what_to_do():
    busy = Exception("The current node timed out during startup. This could happen because of ...")
    said = not_started(busy)
    assert "Ray did not start a cluster on this machine: The current node timed out" in said
    assert "run the same command again" in said


def test_rays_timeout_on_a_busy_machine_ends_a_run_with_2(job, monkeypatch, capsys):
    def busy(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", busy)
    monkeypatch.setattr("cluster.session.session.is_connected", lambda: False)
    monkeypatch.setattr("cluster.session.session._end_private", lambda: None)
    assert main(["run", str(job), "--address", "local"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("PlacementError: Ray did not start a cluster on this machine: The curr")
    assert "Traceback" not in said
    assert main(["run", str(job), "--address", "local"]) == 2, "the run is free for the next try"

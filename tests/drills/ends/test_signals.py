"""SIGTERM, as Slurm and Kubernetes send it, and Ctrl-C: a step is saved, and none is lost."""

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from student_trainer.state.checkpoint import all_checkpoints, step_of
from tests.drills.commands import Command, Home, reached, titled, wait_until
from tests.drills.conftest import STEPS, Job
from tests.drills.evidence import assert_same

pytestmark = pytest.mark.drill

SIGNALS = [signal.SIGTERM, signal.SIGINT]
PATIENCE_S = 60.0


def end(command: Command, number: int, *, group: bool = False) -> str:
    """Send a signal to the command, alone or with all that it has started; returns what it said by
    its end."""
    for process in command.family() if group else [command.process]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    assert command.wait(PATIENCE_S) == 1, command.output
    for sign in ("Traceback", "*** SIG", "core dumped", "fault of Tutelage"):
        assert sign not in command.output, command.output
    return command.output


def nothing_is_left(home: Home) -> bool:
    return not home.processes()


@pytest.mark.parametrize("number", SIGNALS)
def test_training_saves_the_step_under_way_and_goes_on_from_it(
    home: Home, job: Job, tmp_path, number
):
    command, run = ("run", str(job.config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(reached(run, 13), doing=first)  # checkpoints are every 10 steps
    said = end(first, number)
    step = step_of(all_checkpoints(run / "checkpoints")[-1])
    assert step >= 13
    assert f"Stopped after step {step} of {STEPS}, which is saved" in said
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    wait_until(lambda: nothing_is_left(home), patience_s=PATIENCE_S)

    assert f"going on from step {step} of {STEPS}" in home.run(*command)
    assert_same(run, job.reference)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_run_killed_between_checkpoints_writes_no_step_twice(home, config, tmp_path):
    command, run = ("run", str(config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(reached(run, 13), doing=first)
    first.kill_everything()
    assert f"going on from step 10 of {STEPS}" in home.run(*command)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def loading(run: Path, command: Command) -> Callable[[], bool]:
    return lambda: "loading the teacher" in command.output


def evaluating(run: Path, command: Command) -> Callable[[], bool]:
    return lambda: (run / "logs" / "progress.log").exists()


def exporting(run: Path, command: Command) -> Callable[[], bool]:
    return reached(run, STEPS)


def importing(run: Path, command: Command) -> Callable[[], bool]:
    began = time.monotonic()
    return lambda: time.monotonic() - began > 1.5


@pytest.mark.parametrize("stage", [importing, loading, evaluating, exporting])
def test_every_other_stage_ends_with_what_the_next_command_goes_on_from(
    home, config, tmp_path, stage
):
    command, run = ("run", str(config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(stage(run, first), doing=first)
    said = end(first, signal.SIGTERM)
    assert "Interrupted; the same command" in said or "Stopped " in said, said
    wait_until(lambda: nothing_is_left(home), patience_s=PATIENCE_S)


def connecting(run: Path, command: Command) -> Callable[[], bool]:
    return lambda: any(process.name() == "gcs_server" for process in command.family())


@pytest.mark.parametrize("stage", [importing, connecting, loading])
def test_a_signal_to_all_processes_ends_in_a_sentence(home, config, tmp_path, stage):
    command, run = ("run", str(config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(stage(run, first), doing=first)
    said = end(first, signal.SIGTERM, group=True)
    assert "Interrupted; the same command" in said, said
    wait_until(lambda: nothing_is_left(home), patience_s=PATIENCE_S)


def test_a_signal_to_all_processes_of_a_training_loses_no_step(home, config, tmp_path):
    command, run = ("run", str(config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(reached(run, 13), doing=first)  # checkpoints are every 10 steps
    said = end(first, signal.SIGTERM, group=True)
    step = step_of(all_checkpoints(run / "checkpoints")[-1])
    assert step >= 13
    assert f"Stopped after step {step} of {STEPS}, which is saved" in said
    wait_until(lambda: nothing_is_left(home), patience_s=PATIENCE_S)


def test_a_second_signal_ends_a_run_that_waits_for_its_teacher(home, config, tmp_path):
    command, run = ("run", str(config), f"paths.runs={tmp_path}"), tmp_path / "job"
    first = home.start(*command)
    wait_until(reached(run, 13), doing=first)
    replicas = [p for p in first.family() if "TeacherReplica" in " ".join(p.cmdline())]
    for replica in replicas:
        replica.suspend()
    time.sleep(3)
    first.process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert first.running
    assert "SIGINT: the step under way is finished and saved" in first.output
    said = end(first, signal.SIGINT)
    assert "Interrupted; the same command continues from step 10" in said


@pytest.mark.parametrize("number", SIGNALS)
def test_a_probe_ends_at_once_and_leaves_nothing(home, config, number):
    probing = home.start("plan", str(config), "--probe", "student.workers=1")
    wait_until(lambda: bool(titled(home.processes(), "RayTrainWorker")), doing=probing)
    said = end(probing, number)
    assert "Interrupted; the same command starts again." in said
    assert "saved" not in said
    assert list(probes(config).iterdir()) == []
    wait_until(lambda: nothing_is_left(home), patience_s=PATIENCE_S)


def probes(config: Path) -> Path:
    """Where the probes of a config lie while they run."""
    return config.parent / "cache" / "probes"

"""What stops a run stops it with a sentence, and loses nothing."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.state.checkpoint import latest_checkpoint
from teacher_service.engine.description import Engine, TeacherDescription
from teacher_service.service import service
from tests.cluster.jobs import write_job
from tests.drills.commands import reached, wait_until
from tests.drills.evidence import assert_same

pytestmark = pytest.mark.drill

VENOM = "venom"


@dataclass(frozen=True)
class Poisoned:
    """A real engine whose process dies of rows with much of one token."""

    engine: Engine
    token: int

    def describe(self) -> TeacherDescription:
        return self.engine.describe()

    def score(self, rows: Rows, spec: Question) -> SoftTargets:
        if any(np.count_nonzero(ids == self.token) > 5 for ids in rows.column("input_ids")):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.engine.score(rows, spec)


def make_poisoned(teacher: Teacher, token: int) -> Engine:
    return Poisoned(service.default_engine(teacher, None, None), token)


def rarest_token(model: Path, text: str) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)[-1]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for two checkpoints and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the space there is."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def test_a_full_disk_is_named_and_keeps_the_last_good_checkpoint(home, job, small_disk):
    command, run = ("run", str(job.config), f"paths.runs={small_disk}"), small_disk / "job"
    said = home.run(*command, expecting=2)
    assert "StorageError: " in said
    assert "no space left on device" in said.lower()
    kept = latest_checkpoint(run / "checkpoints")  # the newest one that is whole
    assert kept is not None
    assert kept.name in ("step-000010", "step-000020")
    assert not list((run / "checkpoints").glob(".*.draft"))

    resize(small_disk, "16m")
    again = home.start(*command)
    wait_until(reached(run, 33), doing=again)
    ballast = fill(small_disk)  # also no line of metrics fits
    assert again.wait() == 2, again.output
    assert "Traceback" not in again.output
    assert "StorageError: " in again.output
    assert "no space left on device" in again.output.lower()

    ballast.unlink()
    home.run(*command)
    assert_same(run, job.reference)


def test_a_loss_that_is_not_finite_stops_with_step_domains_and_rows(home, config, tmp_path):
    said = home.run("run", str(config), f"paths.runs={tmp_path}", "optimiser.lr=1e30", expecting=2)
    (sentence,) = [line for line in said.splitlines() if line.startswith("NonFiniteLossError")]
    assert "of step 2 is not finite, in letters, numbers, rows letters/" in sentence


def test_a_second_run_of_the_same_name_at_the_same_time_is_refused(home, config, tmp_path):
    command = ("run", str(config), f"paths.runs={tmp_path}")
    first = home.start(*command)
    wait_until(lambda: (tmp_path / ".job.owner").exists(), doing=first)
    started = time.monotonic()
    said = home.run(*command, expecting=2)
    print(f"refused after {time.monotonic() - started:.1f} s")
    assert f"the run 'job' is in use by process {first.process.pid}" in said
    first.kill_everything()


def test_a_row_that_kills_every_replica_stops_the_run_and_is_named(
    ray_cluster, tiny_pair, tmp_path, capsys
):
    poison = " ".join([VENOM] * 60)
    for name in ("train", "validation"):
        text = poison if name == "train" else "one two three four five six " * 12
        (tmp_path / f"poison.{name}.txt").write_text(text)
    path = write_job(
        tmp_path,
        tiny_pair,
        domains={
            "letters": {"train": "letters.jsonl"},
            "poison": {"train": "poison.train.txt", "validation": "poison.validation.txt"},
        },
        mixture={"policy": "fixed", "weights": "uniform"},
    )
    teacher = Teacher(model=str(tiny_pair.teacher), cpus=0.5, replicas=2)
    engine = partial(make_poisoned, teacher, rarest_token(tiny_pair.teacher, f" {VENOM}"))
    service.start("poisoned", teacher, detached=False, make_engine=engine).described()
    try:
        assert main(["train", str(path), "--service", "poisoned"]) == 1
        said = capsys.readouterr().err
    finally:
        service.stop("poisoned")
    assert "TeacherError: the teacher failed 3 times on the unit of rows" in said
    assert "poison/" in said
    assert "died while scoring it" in said

"""Homes that are cleared, one job for all drills, and the run of it that nobody disturbed."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.jobs import write_job
from tests.drills.commands import Home
from tests.tiny import Pair

STEPS = 60
ROWS_PER_STEP = 8
UNITS_PER_STEP = 4


@dataclass(frozen=True)
class Job:
    """A config and the run of it that all drills are compared with."""

    config: Path
    reference: Path


@pytest.fixture
def home() -> Iterator[Home]:
    """A home of this test's own; its path is short, since those of sockets are limited."""
    yield from homes()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_pair: Pair) -> Path:
    """Two replicas, two workers, ZeRO-2 and decisions of DDK; every step has a line."""
    return write_job(
        tmp_path_factory.mktemp("drills"),
        tiny_pair,
        steps=STEPS,
        log_every=1,
        teachers={"tiny": {"model": str(tiny_pair.teacher), "cpus": 0.25, "replicas": 2}},
        student={"model": str(tiny_pair.student), "cpus": 0.25, "zero": 2, "workers": 2},
        batch={"rows_per_step": ROWS_PER_STEP, "micro_batch": ROWS_PER_STEP // UNITS_PER_STEP},
        mixture={"policy": "ddk", "interval": 8, "lag_steps": 2},
        checkpoints={"every": 10},
    )


@pytest.fixture(scope="session")
def job(config: Path) -> Iterator[Job]:
    """The config with its undisturbed run."""
    for home in homes():
        home.run("run", str(config))
        yield Job(config, config.parent / "runs" / "job")


def homes() -> Iterator[Home]:
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    home = Home(folder)
    try:
        yield home
    finally:
        home.clear()
        shutil.rmtree(folder, ignore_errors=True)

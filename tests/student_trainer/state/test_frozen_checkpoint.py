"""Checkpoints that lie in the repository as they were written are gone on with."""

from pathlib import Path

import pytest

from shared.run.metrics import StepMetrics, read_metrics
from student_trainer.state.checkpoint import latest_checkpoint, step_of
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.state.frozen import END, MIDDLE, STAGES, WHOLE, name_of, plan, thaw

ANOTHER = 0  # stage that they go on with, on one rank in place of two


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs, taken from the middle to their end."""
    folder = tmp_path_factory.mktemp("frozen")
    thaw(folder)
    for zero in STAGES:
        checkpoint = latest_checkpoint(folder / name_of(zero) / "checkpoints")
        assert checkpoint is not None
        assert step_of(checkpoint) == MIDDLE
    plans = [plan(folder, name_of(zero), ranks=1, zero=ANOTHER) for zero in STAGES]
    jobs = [as_job("train", made) for made in plans]
    for result in run_jobs(jobs, folder / "jobs", ranks=1):
        assert result["error"] is None, result
    return folder


@pytest.mark.parametrize("zero", STAGES)
def test_it_goes_on_as_if_it_had_never_stopped(runs: Path, zero: int) -> None:
    run = runs / name_of(zero)
    expected, found = read_metrics(run / WHOLE), read_metrics(run / "metrics.jsonl")
    assert [line.step for line in found] == list(range(1, END + 1))
    for line, other in zip(expected, found, strict=True):
        assert (other.tokens, other.lr) == (line.tokens, line.lr)
        assert _sequences(other) == _sequences(line)
        assert other.loss == pytest.approx(line.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(line.grad_norm, rel=1e-4)


def _sequences(line: StepMetrics) -> dict[str, int]:
    return {name: domain.sequences for name, domain in line.domains.items()}

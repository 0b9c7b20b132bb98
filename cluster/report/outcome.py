"""What a run has come to: its repaired failures, its summary and report."""

import json

from cluster.report.measurement import Failures
from cluster.report.page import write_report
from cluster.report.summary import summarise
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir, read_written, write_atomically
from student_trainer.state.checkpoint import whence


def count(run_dir: RunDir, what: str, number: int) -> None:
    """Add to the run's failures, over all commands that worked on it."""
    counts = _counts(run_dir)
    counts[what] = counts.get(what, 0) + max(0, number)
    write_atomically(run_dir.logs / "failures.json", json.dumps(counts))


def failures(run_dir: RunDir) -> Failures:
    """What went wrong and was repaired so far."""
    counts = _counts(run_dir)
    found = Failures(
        teacher_restarts=counts.get("teacher_restarts", 0),
        student_restarts=counts.get("student_restarts", 0),
        retried_units=sum(line.retried_units for line in read_metrics(run_dir.metrics)),
    )
    if "rollout_restarts" in counts:
        found["rollout_restarts"] = counts["rollout_restarts"]
    return found


def conclude(run_dir: RunDir, *, status: str) -> None:
    """Write summary and report, as far as the run has come."""
    if run_dir.metrics.exists():
        summarise(run_dir.path, status=status, failures=failures(run_dir))
        write_report(run_dir.path)


def interrupted(run_dir: RunDir) -> str:
    """The sentence for a run that somebody ends."""
    return f"Interrupted; the same command continues {whence(run_dir.checkpoints)}."


def _counts(run_dir: RunDir) -> dict[str, int]:
    return read_written(run_dir.logs / "failures.json")

"""What two runs must have in common, bit for bit, however often one of them was disturbed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from shared.run.metrics import MACHINE_FIELDS, StepMetrics, read_metrics
from shared.run.run_dir import RunDir
from student_trainer.state.checkpoint import latest_checkpoint


def weights(run: Path) -> dict[str, str]:
    """Digests of the exported weights and of the newest checkpoint's."""
    checkpoint = latest_checkpoint(RunDir(run).checkpoints)
    assert checkpoint is not None
    folders = {"export": RunDir(run).export, checkpoint.name: checkpoint / "weights"}
    return {
        f"{name}/{file.name}": xxhash.xxh3_128_hexdigest(file.read_bytes())
        for name, folder in folders.items()
        for file in sorted(folder.glob("*.safetensors"))
    }


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the machine."""
    return [_decisive(line) for line in read_metrics(run / "metrics.jsonl")]


def assert_same(run: Path, reference: Path) -> None:
    """Weights, metric lines, weight log and evaluations are those of the reference."""
    assert len(weights(reference)) == 2
    assert weights(run) == weights(reference)
    assert metric_lines(run) == metric_lines(reference)
    for name in ("weight_log.jsonl", "evaluations.json"):
        assert (run / name).read_text() == (reference / name).read_text()


def assert_every_row_once(run: Path, *, rows_per_step: int, units_per_step: int) -> None:
    """Every step learnt from as many rows as a block has, and asked for each unit once."""
    for line in read_metrics(run / "metrics.jsonl"):
        assert sum(domain.sequences for domain in line.domains.values()) == rows_per_step
        assert line.units == units_per_step


def failures(run: Path) -> dict[str, int]:
    """The repaired failures that the summary counts."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    return summary["failures"]


def _decisive(line: StepMetrics) -> dict[str, Any]:
    return {name: value for name, value in asdict(line).items() if name not in MACHINE_FIELDS}

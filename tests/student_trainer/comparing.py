"""Runs compared: their weights to the bit, their metrics without what depends on the machine."""

from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from shared.run.metrics import MACHINE_FIELDS, read_metrics


def same_weights(run: Path, other: Path) -> bool:
    """Whether the weights of two last checkpoints are the same, which have the same names."""
    weights, others = final_weights(run), final_weights(other)
    assert weights.keys() == others.keys()
    return all(bool((weights[name] == others[name]).all()) for name in weights)


def final_weights(run: Path) -> dict:
    """Weights of the last checkpoint."""
    return weights_after(run, 4)


def weights_after(run: Path, step: int) -> dict:
    """Weights of the checkpoint of a step."""
    (path,) = (run / "checkpoints" / f"step-{step:06d}" / "weights").glob("*.safetensors")
    return load_file(path)


def comparable_lines(run: Path) -> list[dict]:
    """Metrics lines without what depends on the machine."""
    lines = [asdict(line) for line in read_metrics(run / "metrics.jsonl")]
    return [{k: v for k, v in line.items() if k not in MACHINE_FIELDS} for line in lines]

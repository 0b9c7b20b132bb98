"""The benchmark of selectors runs, and drawing beats ranking at equal bytes."""

from pathlib import Path

import pytest
import torch

from student_trainer.losses.primitive import Head as StudentHead
from teacher_service.scoring import Head
from tests.benchmarks.selectors import Scene, measure, print_table, real_scene


def small_scene(num: int) -> Scene:
    """Random states and heads, 300 ids."""
    torch.manual_seed(0)
    return Scene(
        torch.randn(num, 16),
        Head(torch.randn(300, 16)),
        torch.randn(num, 8),
        StudentHead(torch.randn(300, 8)),
        torch.zeros(num, dtype=torch.long),
    )


def test_it_runs_and_everything_kept_has_no_angle(capsys) -> None:
    choices = [("top_k", 300), ("threshold", 300), ("threshold", 16), ("renormalised", 16)]
    found = list(measure(small_scene(40), choices, tokens=(20, 40), draws=2))  # type: ignore[arg-type]
    assert len(found) == 8
    whole = [result for result in found if result.size == 300]
    assert max(result.angle for result in whole) < 0.1
    assert all(result.norm == pytest.approx(1, abs=1e-3) for result in whole)
    print_table(found)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(choices)


@pytest.mark.benchmark
def test_threshold_is_nearer_than_anything_that_costs_as_much(
    reference: Path, tmp_path: Path
) -> None:
    choices = [("renormalised", 32), ("top_k", 32), ("top_k", 64), ("sampled", 50)]
    choices += [("threshold", 32), ("threshold", 48), ("threshold", 64)]
    scene = real_scene(reference, tmp_path, rows=2)
    measured = measure(scene, choices, tokens=(512, 2048), draws=4)  # type: ignore[arg-type]
    found = {(r.name, r.size, r.tokens): r for r in measured}
    for cheap, dear in ((32, ("sampled", 50)), (48, ("top_k", 32)), (64, ("top_k", 64))):
        one, other = found["threshold", cheap, 2048], found[(*dear, 2048)]
        assert one.num_bytes < 1.1 * other.num_bytes
        assert one.angle < 0.7 * other.angle
    for size in (32, 48, 64):  # variance averages out, bias does not
        assert found["threshold", size, 2048].angle < 0.8 * found["threshold", size, 512].angle
    for name, size in (("renormalised", 32), ("top_k", 32), ("top_k", 64)):
        assert found[name, size, 2048].angle > found[name, size, 512].angle

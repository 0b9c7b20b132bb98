"""The token loss at a large size, against full logits, compiled ones, TRL and Liger.

At all positions, and at fewer, where full logits have room too.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from tests.benchmarks import losses
from tests.benchmarks.gpu.sections import Case, Numbers, timed
from tests.benchmarks.gpu.sizes import Sizes

ORDER = {"ours": 0, "compiled": 2}  # all others between


def cases(sizes: Sizes, device: torch.device) -> Mapping[str, Case]:
    """Of both sizes and tasks, every contestant that is here; ours first, and last what has to be
    compiled, which takes longest."""
    num, width, vocabulary = sizes.loss
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    size = losses.Size(num, width, vocabulary, dtype=dtype, device=device.type)
    asked = [(task, name) for task, names in losses.TASKS.items() for name in names]
    asked = [pair for pair in asked if pair[1] not in sizes.left_out]
    asked.sort(key=lambda pair: ORDER.get(pair[1], 1))
    return {
        f"{name}, {task}, N = {rows}": partial(
            contestant, task, name, replace(size, rows=rows), sizes.rounds
        )
        for task, name in asked
        for rows in (num, sizes.fewer_rows)
    }


def contestant(task: str, name: str, size: losses.Size, rounds: int) -> Numbers:
    """Seconds of forward and backward, and the peak above what there was before."""
    if not losses.is_here(name):
        return {"left_out": f"{name} is not installed"}
    problem, call = losses.Problem.random(size), losses.prepared(task, name)

    def forget() -> None:
        problem.hidden_ND.grad = problem.weight_VD.grad = None

    device = problem.hidden_ND.device
    found = timed(lambda: call(problem).backward(), device, rounds, before=forget)
    gradients = problem.hidden_ND.nbytes + problem.weight_VD.nbytes
    return {**found, "gradient_bytes": gradients}

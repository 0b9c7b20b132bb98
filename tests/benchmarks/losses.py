"""The token loss against full logits and against two other libraries: accuracy, time and memory.

Forward KL with the gradients of states and head, on one thread, from random states and heads. Two
tasks: `whole`, over the whole vocabulary from both models' states and heads, which TRL's
`ChunkedDivergenceFunction` and Liger's `LigerFusedLinearJSDLoss` compute too, where they can be
imported; and `64 ids`, from what a teacher ships of its 64 likeliest. Eager and compiled are
`log_softmax` over full logits.

Seconds are processor time, on a GPU those that pass, in turns in one process, the least of the
rounds; memory is the largest resident size of a fresh process in one call, on a GPU that of all
tensors, above what it had before and the two gradients that any loss returns. Errors are relative,
against float64 on the first positions. A GPU without room for full logits needs `--losses ours`.

    python -m tests.benchmarks.losses [--rows 1024] [--widths 256 1536] [--rounds 2]
    python -m tests.benchmarks.losses --device cuda --dtype bfloat16 --rows 65536 --widths 2048

N positions   D width of both models   V vocabulary
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import log1mexp
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets, TeacherTargets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses

TOP_K = 64
WIDTHS, VOCABULARIES = (256, 1_536), (32_000, 151_936)
CHECKED = 32  # positions that errors are measured on
FORWARD_KL = SimpleNamespace(
    kind="forward_kl", weight=1.0, temperature=1.0, times_temperature_squared=True
)


@dataclass(frozen=True)
class Size:
    """Of a problem."""

    rows: int
    width: int
    vocabulary: int
    dtype: str = "float32"  # of states and heads
    device: str = "cpu"


@dataclass(frozen=True)
class Problem:
    """A student's and a teacher's states and heads, and the teacher's 64 likeliest ids."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    shipped: TeacherTargets
    label_N: Tensor

    @staticmethod
    def random(size: Size) -> "Problem":
        """Logits of standard deviation 1, the teacher's 2."""
        torch.manual_seed(0)
        rows, width, vocabulary = size.rows, size.width, size.vocabulary
        made = {"device": size.device, "dtype": getattr(torch, size.dtype)}
        weights = [torch.randn(vocabulary, width, **made).div_(width**0.5) for _ in range(2)]
        first_N1 = torch.randint(vocabulary - TOP_K, (rows, 1), device=size.device)
        ids_NK = first_N1 + torch.arange(TOP_K, device=size.device)
        kept_NK = torch.log_softmax(2 * torch.randn(rows, TOP_K + 1, device=size.device), -1)
        return Problem(
            torch.randn(rows, width, **made).requires_grad_(),
            weights[0].requires_grad_(),
            2 * torch.randn(rows, width, **made),
            weights[1],
            TeacherTargets(ids_NK, kept_NK[:, :-1], kept_NK[:, -1:], (1.0,)),
            ids_NK[:, 0].clone(),
        )

    def in_float64(self) -> "Problem":
        """The same numbers, exactly, as fresh leaves."""
        shipped = replace(
            self.shipped,
            logprobs_NK=self.shipped.logprobs_NK.double(),
            log_tail_NS=self.shipped.log_tail_NS.double(),
        )
        return Problem(
            self.hidden_ND.detach().double().requires_grad_(),
            self.weight_VD.detach().double().requires_grad_(),
            self.teacher_ND.double(),
            self.teacher_VD.double(),
            shipped,
            self.label_N,
        )

    def forget(self) -> None:
        """Drop the gradients of the last call."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        gc.collect()


Loss = Callable[[Problem], Tensor]


def ours(problem: Problem, targets: Targets) -> Tensor:
    """The product's loss."""
    return token_losses(
        problem.hidden_ND,
        Head(problem.weight_VD),
        label_N=problem.label_N,
        terms=terms_of([FORWARD_KL]),
        targets=targets,
    ).loss


def ours_whole(problem: Problem) -> Tensor:
    """Over the whole vocabulary."""
    head = TeacherHead(Head(problem.teacher_VD), len(problem.teacher_VD))
    return ours(problem, TeacherStates(problem.teacher_ND, head))


def ours_of_64(problem: Problem) -> Tensor:
    """Over 64 ids and the tail."""
    return ours(problem, problem.shipped)


def full_logits_whole(problem: Problem) -> Tensor:
    """Over the whole vocabulary, from full logits of both."""
    log_q_NV = torch.log_softmax(problem.hidden_ND @ problem.weight_VD.t(), -1)
    log_p_NV = torch.log_softmax(problem.teacher_ND @ problem.teacher_VD.t(), -1)
    return torch.nn.functional.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def full_logits_of_64(problem: Problem) -> Tensor:
    """Over 64 ids and the tail, from full logits: the cheapest dense loss of the kind, its tail by
    subtraction."""
    log_q_NV = torch.log_softmax(problem.hidden_ND @ problem.weight_VD.t(), -1)
    log_q_NK = log_q_NV.gather(1, problem.shipped.ids_NK)
    log_q_tail_N = log1mexp(log_q_NK.logsumexp(-1))
    p_NK, p_tail_N = problem.shipped.logprobs_NK, problem.shipped.log_tail_NS[:, 0]
    kl_N = (p_NK.exp() * (p_NK - log_q_NK)).sum(-1)
    return (kl_N + p_tail_N.exp() * (p_tail_N - log_q_tail_N)).sum()


def trl(problem: Problem) -> Tensor:
    """TRL: beta 0 is forward KL."""
    module = importlib.import_module("trl.kernels.chunked_divergence")
    function: Any = module.ChunkedDivergenceFunction
    student = (problem.hidden_ND, problem.weight_VD, None)
    teacher = (problem.teacher_ND, problem.teacher_VD, None)
    divergence_N, *_ = function.apply(*student, *teacher, 0.0, 1.0)
    return divergence_N.sum()


def liger(problem: Problem) -> Tensor:
    """Liger: without its hard loss, a mean turned into a sum."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss: Any = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    student = (problem.hidden_ND, problem.weight_VD)
    teacher = (problem.teacher_ND, problem.teacher_VD)
    return loss(*student, *teacher, problem.label_N) * len(problem.label_N)


TASKS: dict[str, dict[str, Loss]] = {
    "whole": {
        "ours": ours_whole,
        "eager": full_logits_whole,
        "compiled": full_logits_whole,
        "TRL": trl,
        "Liger": liger,
    },
    "64 ids": {"ours": ours_of_64, "eager": full_logits_of_64, "compiled": full_logits_of_64},
}
LOSSES = tuple(TASKS["whole"])
EXACT = {"whole": full_logits_whole, "64 ids": full_logits_of_64}
MODULES = {"TRL": "trl.kernels.chunked_divergence", "Liger": "liger_kernel.chunked_loss"}


def contestants(task: str, names: Sequence[str]) -> dict[str, Loss]:
    """Those of a task that are named and here, ready to be called."""
    return {name: prepared(task, name) for name in TASKS[task] if name in names and is_here(name)}


def is_here(name: str) -> bool:
    """Whether a contestant can be imported."""
    try:
        importlib.import_module(MODULES.get(name, "torch"))
    except ImportError:
        return False
    return True


def prepared(task: str, name: str) -> Loss:
    """A contestant, compiled where it is to be."""
    return torch.compile(TASKS[task][name]) if name == "compiled" else TASKS[task][name]


@dataclass(frozen=True)
class Result:
    """One contestant at one size."""

    task: str
    name: str
    size: Size
    seconds: float
    extra_bytes: int  # 0 where it was not measured
    value_error: float
    gradient_error: float  # the larger of both gradients'


def measure(
    task: str, size: Size, *, rounds: int, names: Sequence[str] = LOSSES, memory: bool = True
) -> list[Result]:
    """The contestants of a task at a size."""
    problem, calls = Problem.random(size), contestants(task, names)
    for call in calls.values():  # imports, compilation, the first touch of memory
        seconds(call, problem)
    turns = [{name: seconds(call, problem) for name, call in calls.items()} for _ in range(rounds)]
    checked = Problem.random(replace(size, rows=min(CHECKED, size.rows)))
    exact = outcome(EXACT[task], checked.in_float64())
    results = []
    for name, call in calls.items():
        errors = [relative_error(*pair) for pair in zip(outcome(call, checked), exact, strict=True)]
        results.append(
            Result(
                task=task,
                name=name,
                size=size,
                seconds=min(turn[name] for turn in turns),
                extra_bytes=in_a_process(task, name, size) if memory else 0,
                value_error=errors[0],
                gradient_error=max(errors[1:]),
            )
        )
    return results


def seconds(call: Loss, problem: Problem) -> float:
    """Time of forward and backward: the processor's, or that which passes on a GPU."""
    problem.forget()
    if not problem.hidden_ND.is_cuda:
        start = time.process_time()
        call(problem).backward()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(problem).backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def outcome(call: Loss, problem: Problem) -> list[Tensor]:
    """The value and both gradients."""
    problem.forget()
    value = call(problem)
    return [value.detach(), *torch.autograd.grad(value, [problem.hidden_ND, problem.weight_VD])]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - exact).norm() / exact.norm())


def in_a_process(task: str, name: str, size: Size) -> int:
    """`extra_bytes` of a fresh process."""
    arguments = json.dumps({"task": task, "name": name, "size": asdict(size)})
    command = [sys.executable, "-m", "tests.benchmarks.losses", "--one", arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def extra_bytes(task: str, name: str, size: Size) -> int:
    """How far one call lifts the resident size of this process, or what a GPU holds of tensors,
    less the two gradients."""
    problem, call = Problem.random(size), prepared(task, name)
    # Small first, for imports and threads; compiled code is made for a size and needs it whole.
    seconds(call, problem if name == "compiled" else Problem.random(replace(size, rows=8)))
    problem.forget()
    gradients = problem.hidden_ND.nbytes + problem.weight_VD.nbytes
    if problem.hidden_ND.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(problem).backward()
        return torch.cuda.max_memory_allocated() - before - gradients
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    call(problem).backward()
    return resident("VmHWM") - before - gradients


def resident(name: str) -> int:
    """Bytes of this process's memory, as the kernel counts them."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


HEADER = """\
| task | N | D | V | loss | time / eager | extra MB | error, value | error, gradient |
|---|---:|---:|---:|---|---:|---:|---:|---:|"""


def lines(results: list[Result]) -> str:
    """The contestants of one task and size below `HEADER`; times as a ratio to full logits, eager,
    or to the first where those are left out."""
    if not results:
        return ""
    eager = next((r.seconds for r in results if r.name == "eager"), results[0].seconds)
    return "\n".join(
        f"| {r.task} | {r.size.rows:,} | {r.size.width:,} | {r.size.vocabulary:,} | {r.name} | "
        f"{r.seconds / eager:.2f} | {r.extra_bytes / 1e6:,.0f} | {r.value_error:.0e} | "
        f"{r.gradient_error:.0e} |"
        for r in results
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_024])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        asked = json.loads(options.one)
        print(extra_bytes(asked["task"], asked["name"], Size(**asked["size"])))
        return
    print(HEADER, flush=True)
    for task, rows, width, vocabulary in product(
        options.tasks, options.rows, options.widths, options.vocabularies
    ):
        size = Size(rows, width, vocabulary, options.dtype, options.device)
        found = measure(task, size, rounds=options.rounds, names=options.losses)
        print(lines(found), flush=True)


if __name__ == "__main__":
    main()

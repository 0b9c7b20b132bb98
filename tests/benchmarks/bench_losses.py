"""The chunked loss against `log_softmax` over full logits: time and memory, forward and backward.

The comparison is the cheapest dense loss of the same kind: full logits, `log_softmax`, a gather of
the kept ids, their tail by subtraction. Both compute forward KL with the gradients of hidden states
and head, on one thread, in turns in one process; seconds are processor time, which other load on
the machine disturbs least. Memory is the peak of live tensor bytes above the
inputs, less the two gradients, in chunks of float32 logits.

    python -m tests.benchmarks.bench_losses [--rounds 5]
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from student_trainer.losses.buckets import log1mexp
from student_trainer.losses.objective import TeacherTargets, token_losses
from student_trainer.losses.primitive import Head, chunks, default_chunk_rows
from tests.allocations import peak_bytes

TOP_K = 64
SIZES = [(256, 32_000), (256, 151_936), (1_536, 32_000), (1_536, 151_936)]
FORWARD_KL = SimpleNamespace(
    kind="forward_kl", weight=1.0, temperature=1.0, times_temperature_squared=True
)


@dataclass(frozen=True)
class Result:
    """One size: processor seconds of each side, and memory in chunks of logits."""

    width: int
    vocabulary: int
    rows: int
    chunked_s: float
    dense_s: float
    ratio: float  # of the fastest rounds
    median_ratio: float  # of the rounds' own ratios
    extra_chunks: float
    dense_extra_chunks: float


@dataclass(frozen=True)
class Problem:
    """Random states, head and targets."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets: TeacherTargets
    label_N: Tensor

    @staticmethod
    def random(rows: int, *, width: int, vocabulary: int) -> "Problem":
        """A student's states and a teacher that keeps `TOP_K` ids."""
        torch.manual_seed(0)
        ids_NK = torch.rand(rows, vocabulary).topk(TOP_K).indices
        kept_NK = torch.log_softmax(2 * torch.randn(rows, TOP_K + 1), -1)
        targets = TeacherTargets(ids_NK, kept_NK[:, :-1], kept_NK[:, -1:], (1.0,))
        hidden_ND = torch.randn(rows, width).requires_grad_()
        weight_VD = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
        return Problem(hidden_ND, weight_VD, targets, ids_NK[:, 0].clone())

    def chunked(self) -> None:
        """Forward and backward through the product's loss."""
        token_losses(
            self.hidden_ND,
            Head(self.weight_VD),
            label_N=self.label_N,
            terms=[FORWARD_KL],
            targets=self.targets,
        ).loss.backward()

    def dense(self) -> None:
        """Forward and backward through full logits."""
        log_q_NV = torch.log_softmax(self.hidden_ND @ self.weight_VD.t(), -1)
        log_q_NK = log_q_NV.gather(1, self.targets.ids_NK)
        log_q_tail_N = log1mexp(log_q_NK.logsumexp(-1))
        p_NK, p_tail_N = self.targets.logprobs_NK, self.targets.log_tail_NS[:, 0]
        kl_N = (p_NK.exp() * (p_NK - log_q_NK)).sum(-1)
        (kl_N + p_tail_N.exp() * (p_tail_N - log_q_tail_N)).sum().backward()

    def forget(self) -> None:
        """Drop the gradients of the last call."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        gc.collect()

    def seconds(self, call: Callable[[], None]) -> float:
        """Processor time of one call from a clean state."""
        self.forget()
        start = time.process_time()
        call()
        return time.process_time() - start

    def extra_bytes(self, call: Callable[[], None]) -> int:
        """Peak of live tensor bytes in a call beyond the gradients of states and head."""
        self.forget()
        required = 4 * (self.hidden_ND.numel() + self.weight_VD.numel())
        return peak_bytes(call) - required


def measure(*, width: int, vocabulary: int, rows: int, rounds: int) -> Result:
    """Both sides in turns, so that other load on the machine meets both."""
    problem = Problem.random(rows, width=width, vocabulary=vocabulary)
    pairs = [
        (problem.seconds(problem.chunked), problem.seconds(problem.dense)) for _ in range(rounds)
    ]
    chunked_s, dense_s = (min(side) for side in zip(*pairs, strict=True))
    limit = default_chunk_rows(vocabulary, num_ids=TOP_K + 1)
    chunk_rows = max(part.stop - part.start for part in chunks(rows, rows_per_chunk=limit))
    chunk_bytes = 4 * vocabulary * chunk_rows
    return Result(
        width=width,
        vocabulary=vocabulary,
        rows=rows,
        chunked_s=chunked_s,
        dense_s=dense_s,
        ratio=chunked_s / dense_s,
        median_ratio=statistics.median(ours / theirs for ours, theirs in pairs),
        extra_chunks=problem.extra_bytes(problem.chunked) / chunk_bytes,
        dense_extra_chunks=problem.extra_bytes(problem.dense) / chunk_bytes,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1_024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("   D        V     N  chunked s  dense s  ratio  median  extra memory, chunks (dense)")
    for rows in options.rows:
        for width, vocabulary in SIZES:
            r = measure(width=width, vocabulary=vocabulary, rows=rows, rounds=options.rounds)
            print(
                f"{r.width:5} {r.vocabulary:8} {r.rows:5} {r.chunked_s:10.3f} {r.dense_s:8.3f} "
                f"{r.ratio:6.3f} {r.median_ratio:7.3f}  {r.extra_chunks:8.2f} "
                f"({r.dense_extra_chunks:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()

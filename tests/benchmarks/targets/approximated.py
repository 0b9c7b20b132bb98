"""A polynomial tail, as DistillKit 1.0 compresses what it captures, to compare selectors with.

Own code from a description of that scheme: the k most likely ids, packed at ceil(log2 V) bits; the
log-probabilities of the first few in bfloat16; of the others the least-squares fit of a small basis
over the rank, its coefficients in float32. Its students take the mass outside in one of two ways:
`zero`, the k ids renormalised against the student's whole distribution; or `symmetric_uniform`, one
bucket for everything else on both sides, which is exact at temperature 1, used here.

N positions   V ids   K ids kept per position
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import log1mexp
from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.targets import TeacherTargets

FULL = -1e-6  # the largest log-mass of the kept ids: a fit may exceed 0


@dataclass(frozen=True)
class PolynomialTail:
    """How much of a position is kept, and the basis of the rest: powers of the rank."""

    top_k: int
    exact: int
    powers: tuple[float, ...]

    def num_bytes(self, vocab: int) -> int:
        """Of a position."""
        ids = -(-self.top_k * (vocab - 1).bit_length() // 8)
        return ids + 2 * self.exact + 4 * len(self.powers)

    def fit(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, most likely first, and the log-probabilities as they are read back [N, K]."""
        logprobs_NK, ids_NK = logits_NV.log_softmax(1).topk(self.top_k, sorted=True)
        exact_NE = logprobs_NK[:, : self.exact].bfloat16().float()
        rest = self.top_k - self.exact
        rank = torch.arange(1, rest + 1, dtype=torch.float64) / rest
        basis = torch.stack([rank**power for power in self.powers], dim=1)
        coefficients = logprobs_NK[:, self.exact :].double() @ torch.linalg.pinv(basis).T
        curve_NR = coefficients.float() @ basis.T.float()
        return ids_NK, torch.cat([exact_NE, curve_NR], dim=1)


BUDGET = PolynomialTail(50, 1, (0, 1, 0.5))
DEFAULT = PolynomialTail(128, 16, (0, 1, 2, 3, 4, 0.5))


def renormalised(ids_NK: Tensor, logprobs_NK: Tensor) -> DrawnTargets:
    """`zero`: the kept ids are the whole teacher; the student has all of its ids."""
    nothing_N = torch.zeros(len(ids_NK))
    return DrawnTargets(ids_NK, logprobs_NK.log_softmax(1), nothing_N, nothing_N, 1.0)


def bucketed(ids_NK: Tensor, logprobs_NK: Tensor) -> TeacherTargets:
    """`symmetric_uniform` at temperature 1: what the kept ids lack of 1 is in one bucket."""
    log_tail_N = log1mexp(logprobs_NK.logsumexp(1).clamp(max=FULL))
    return TeacherTargets(ids_NK, logprobs_NK, log_tail_N[:, None], (1.0,))

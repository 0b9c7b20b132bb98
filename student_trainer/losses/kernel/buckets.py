"""Two bucketed distributions: the kept ids of a position and "anything else", in log space.

Merging outcomes into a bucket can only lower an f-divergence, so what is computed on buckets is a
lower bound of its full-vocabulary counterpart and meets it where every id is kept.

N positions   K ids kept per position
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What a student's mass is compared to where the teacher has none at all: e^-80 is near the
# smallest float32, and keeps a divergence that divides by the teacher finite.
LOG_NOTHING = -80.0


@dataclass(frozen=True, slots=True)
class Buckets:
    """Log-probabilities of the kept ids [N,K] and of everything else [N]; they sum to 1.

    The tail is -inf where nothing lies outside the kept ids.
    """

    kept_NK: Tensor
    tail_N: Tensor

    def detach(self) -> "Buckets":
        """The same numbers without a gradient."""
        return Buckets(self.kept_NK.detach(), self.tail_N.detach())

    def without_zeros(self) -> "Buckets":
        """Outcomes of probability 0 at e^-80, all others as they are."""
        parts = (self.kept_NK, self.tail_N)
        return Buckets(*(x.masked_fill(x == -torch.inf, LOG_NOTHING) for x in parts))


@dataclass(frozen=True, slots=True)
class DrawnBuckets(Buckets):
    """Ids drawn from a teacher, with the logs of their weights in place of log-probabilities; they
    sum to 1 without a tail, which is -inf. Ids may repeat."""

    entropy_N: Tensor  # nats, of the teacher's whole distribution


def teacher_distribution(logprobs_NK: Tensor, log_tail_N: Tensor, *, temperature: float) -> Buckets:
    """The teacher's buckets at a temperature, from what it shipped.

    `logprobs_NK` are log-probabilities at temperature 1, possibly rounded; `log_tail_N` is the
    exact log-mass outside them at `temperature`. The kept ids share what the tail leaves,
    log p_i = l_i / T - logsumexp(l / T) + log(1 - tail), so that all buckets sum to 1 whatever
    the rounding, and the shipped tail stays exact.
    """
    scaled_NK = logprobs_NK / temperature
    log_kept_mass_N = log1mexp(log_tail_N) - scaled_NK.logsumexp(-1)
    return Buckets(scaled_NK + log_kept_mass_N[:, None], log_tail_N)


def mixture(first: Buckets, second: Buckets, *, share: float) -> Buckets:
    """share x first + (1 - share) x second, outcome by outcome: exact on any grouping of ids."""
    return Buckets(
        _log_mixture(first.kept_NK, second.kept_NK, share),
        _log_mixture(first.tail_N, second.tail_N, share),
    )


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation at either end (Maechler 2012, Eq. 7)."""
    near_zero = x > -math.log(2)
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def sum_p_log_ratio(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """The sum of `p_log_ratio` over the last dimension [N], with three temporaries of its size;
    differentiable once."""
    return _SumPLogRatio.apply(log_p_NK, log_q_NK)


class _SumPLogRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
        p_NK = log_p_NK.exp()
        ratio_NK = log_p_NK - log_q_NK
        sum_N = None if ratio_NK.is_cuda else torch.linalg.vecdot(p_NK, ratio_NK)
        # The mask costs more than all else. It is needed where a log is -inf, which a sum that is
        # not finite tells; to ask it would make a GPU wait.
        if sum_N is None or not sum_N.isfinite().all():
            ratio_NK.masked_fill_(p_NK == 0, 0)
            sum_N = torch.linalg.vecdot(p_NK, ratio_NK)
        ctx.save_for_backward(p_NK, *([ratio_NK] if ctx.needs_input_grad[0] else []))
        return sum_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_N1, (p_NK, *ratio) = grad_outputs[0][:, None], ctx.saved_tensors
        slopes = [None, None]
        if ratio:
            slopes[0] = (ratio[0] + 1).mul_(p_NK).mul_(grad_N1)
        if ctx.needs_input_grad[1]:
            slopes[1] = p_NK * -grad_N1
        return slopes[0], slopes[1]


def p_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), which is 0 with a zero gradient where p is 0, also at log p = -inf."""
    p = log_p.exp()
    return p * torch.where(p > 0, log_p - log_q, 0)


def p_log(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, which is 0 with a zero gradient where p is 0."""
    p = log_p.exp()
    return p * torch.where(p > 0, log_q, 0)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """-inf, with a zero gradient, where both are; either one as it is at a share of 1 or 0."""
    if share in (0, 1):
        return log_a if share else log_b
    absent = (log_a == -torch.inf) & (log_b == -torch.inf)
    mixed = torch.logaddexp(
        (log_a + math.log(share)).masked_fill(absent, 0),
        (log_b + math.log1p(-share)).masked_fill(absent, 0),
    )
    return mixed.masked_fill(absent, -torch.inf)

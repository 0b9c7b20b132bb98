"""Divergences of two bucketed distributions: the kept ids of a position and "anything else".

Every divergence is a function of two `Buckets`, one value per position, in nats, without any
reduction. Merging outcomes into a bucket can only lower an f-divergence, so each is a lower bound
of its full-vocabulary counterpart and meets it where every id is kept.

N positions   K ids kept per position
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Buckets:
    """Log-probabilities of the kept ids [N,K] and of everything else [N]; they sum to 1.

    The tail is -inf where nothing lies outside the kept ids.
    """

    kept_NK: Tensor
    tail_N: Tensor


def forward_kl(teacher: Buckets, student: Buckets) -> Tensor:
    """KL(teacher || student) on K+1 outcomes, nats [N]: the mean-seeking direction.

    With q the student's softmax and p the teacher, the gradient with respect to the student's
    logits is q_j - p_j on kept ids and q_j (1 - p_tail / q_tail) elsewhere: zero at p = q.
    """
    kept_NK = p_log_ratio(teacher.kept_NK, student.kept_NK)
    return kept_NK.sum(-1) + p_log_ratio(teacher.tail_N, student.tail_N)


def soft_cross_entropy(teacher: Buckets, student: Buckets) -> Tensor:
    """-sum p log q on K+1 outcomes, nats [N]: forward KL plus the teacher's bucketed entropy.

    Its gradient is forward KL's. The soft-target loss of AKD (Saxena, Janzen and Maass, 2024).
    """
    kept_NK = _p_log(teacher.kept_NK, student.kept_NK)
    return -(kept_NK.sum(-1) + _p_log(teacher.tail_N, student.tail_N))


DIVERGENCES: dict[str, Callable[[Buckets, Buckets], Tensor]] = {
    "forward_kl": forward_kl,
    "soft_cross_entropy": soft_cross_entropy,
}


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


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation at either end (Maechler 2012, Eq. 7)."""
    near_zero = x > -math.log(2)
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def p_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), which is 0 with a zero gradient where p is 0, also at log p = -inf."""
    p = log_p.exp()
    return p * torch.where(p > 0, log_p - log_q, 0)


def _p_log(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, which is 0 with a zero gradient where p is 0."""
    p = log_p.exp()
    return p * torch.where(p > 0, log_q, 0)

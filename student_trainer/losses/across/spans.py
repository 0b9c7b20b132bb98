"""Spans of several tokens: the probability of a piece of text under both models, by the chain rule.

A span is one outcome and any other text the other one. Its log-probability is the sum of those of
its tokens, in each model's own tokenization, which a divergence of two buckets compares. Each token
of the student's has the whole gradient of its span's value, as the chain rule has it, and an equal
share of the value.

N positions   n positions of a chunk
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, log1mexp
from student_trainer.losses.kernel.labelled import ROUNDING

HALF = -math.log(2)  # in place of what is of no span, so that its gradient is a number


@dataclass(frozen=True, slots=True)
class Spans:
    """What is known of each position's span, beside the student's own log-probability there."""

    teacher_N: Tensor  # log-probability of the span under the teacher
    rest_N: Tensor  # under the student, of the span's other tokens; no gradient
    share_N: Tensor  # one over the student's tokens of the span; 0 at positions of none

    def part(self, rows: slice) -> "Spans":
        """Of a chunk."""
        return Spans(self.teacher_N[rows], self.rest_N[rows], self.share_N[rows])

    def value(self, of: Callable[[Buckets, Buckets], Tensor], label_logprob_N: Tensor) -> Tensor:
        """A divergence of the spans [N], differentiable in the student's log-probability of each
        position's label; 0 at positions of none."""
        held_N = self.share_N > 0
        own_N = torch.where(held_N, self.rest_N + label_logprob_N, HALF)
        teacher_N = torch.where(held_N, self.teacher_N, HALF)
        value_N = of(_two_buckets(teacher_N.to(own_N.dtype)), _two_buckets(own_N))
        shared_N = value_N - (1 - self.share_N).to(value_N.dtype) * value_N.detach()
        return torch.where(held_N, shared_N, 0.0)


def rest_of_spans(label_logprob_N: Tensor, span_N: Tensor) -> Tensor:
    """The log-probability of the other tokens of each position's span [N]; 0 at positions of none,
    whose span is negative."""
    held_N = span_N >= 0
    span_N = span_N.clamp(min=0)
    own_N = label_logprob_N.masked_fill(~held_N, 0.0)
    sums_S = own_N.new_zeros(int(span_N.max()) + 1 if len(span_N) else 1)
    return (sums_S.index_add_(0, span_N, own_N)[span_N] - own_N).masked_fill(~held_N, 0.0)


def _two_buckets(logprob_N: Tensor) -> Buckets:
    """The span and any other text."""
    bounded_N = logprob_N.clamp(max=-ROUNDING)
    return Buckets(bounded_N[:, None], log1mexp(bounded_N))

"""One chunk of positions: its logits, log-probabilities read from them, and their gradient.

Everything large happens in place in one buffer per temperature, allocated once for all chunks
(one more where a soft-cap needs the logits again).

n positions of a chunk   D hidden width   V student vocabulary   M ids asked about per position
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.primitive import Head, precision
from student_trainer.losses.kernel.products import logits_product


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Student log-probabilities of the ids [n,M] and of all but the kept ones [n]."""

    ids_nM: Tensor
    tail_n: Tensor


@dataclass(frozen=True, slots=True)
class Slopes:
    """Derivatives of a chunk's loss with respect to the log-probabilities at one temperature."""

    ids_nM: Tensor
    tail_n: Tensor


class ChunkBuffers:
    """What the chunks of one call take turns in, [n,V]: the last has the logits at first."""

    head: Head
    _buffers: list[Tensor]

    def load(self, hidden_nD: Tensor) -> None:
        """Form the logits of a chunk."""
        self._chunk_nV = [buffer[: len(hidden_nD)] for buffer in self._buffers]
        head_logits(hidden_nD, self.head, out_nV=self._chunk_nV[-1])

    @property
    def gradient_nV(self) -> Tensor:
        """Of the chunk, once all parts are turned."""
        return self._chunk_nV[0]


class ChunkWorkspace(ChunkBuffers):
    """Buffers [n,V] in which the chunks of one call take turns."""

    def __init__(
        self,
        head: Head,
        *,
        like_ND: Tensor,
        temperatures: Sequence[float],
        rows: int,
        gradients: bool,
    ) -> None:
        self.head, self.temperatures = head, tuple(temperatures)
        self._keeps_logits = gradients and head.soft_cap is not None
        count = len(self.temperatures) if gradients else min(2, len(self.temperatures))
        self._buffers = [
            like_ND.new_empty((rows, head.vocabulary), dtype=precision(like_ND))
            for _ in range(count + self._keeps_logits)
        ]

    def log_probs(self, part: slice, ids_nM: Tensor, kept_nM: Tensor) -> list[LogProbs]:
        """Read the log-probabilities of a part of the chunk at every temperature.

        Leaves the softmax over the complement of the kept ids in each temperature's buffer.
        """
        self._buffers_nV = [buffer[part] for buffer in self._chunk_nV]
        self._ids_nM, self._kept_nM = ids_nM, kept_nM
        logits_nV = self._buffers_nV[-1]
        self._picked_nM = logits_nV.gather(1, ids_nM)
        # Adding -inf or 0 also does the right thing where a marked id is repeated unmarked.
        logits_nV.scatter_add_(1, ids_nM, _minus_infinity(kept_nM, logits_nV.dtype))
        self._student = []
        for index, temperature in enumerate(self.temperatures):
            peaks = self._soften(logits_nV, self._buffer(index), temperature)
            self._student.append(self._normalised(temperature, *peaks))
        return self._student

    def to_gradient(self, part: slice, slopes: Sequence[Slopes | None]) -> None:
        """Turn what `log_probs` left of the part into the gradient of the product with the head.

        On the complement, softmax = tail x softmax over the complement, so that one factor per
        position serves; the ids asked about are added on top.
        """
        grad_nV, picked_nM = None, torch.zeros_like(self._picked_nM)
        for index, slope in enumerate(slopes):
            if slope is None:
                continue
            per_logit = self.head.logit_scale / self.temperatures[index]
            part_nV = self._buffer(index)
            part_nV.mul_((self._complement_factor(index, slope) * per_logit)[:, None])
            picked_nM += self._picked_gradient(index, slope) * per_logit
            grad_nV = part_nV if grad_nV is None else grad_nV.add_(part_nV)
        assert grad_nV is not None, "the loss depends on no temperature"
        if self.head.soft_cap is not None:
            self._through_soft_cap(grad_nV, picked_nM)
        grad_nV.scatter_add_(1, self._ids_nM, picked_nM)
        if grad_nV is not self._buffers_nV[0]:
            self._buffers_nV[0].copy_(grad_nV)

    def _buffer(self, index: int) -> Tensor:
        """Where a temperature's softmax goes; the last one overwrites the logits."""
        last = index == len(self.temperatures) - 1
        if last and not self._keeps_logits:
            return self._buffers_nV[-1]
        return self._buffers_nV[min(index, len(self._buffers_nV) - 2)]

    def _soften(
        self, logits_nV: Tensor, out_nV: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Softmax over the complement into `out`; its largest logit and their log-sum above it."""
        scaled_nV = logits_nV
        if temperature != 1:
            scaled_nV = torch.div(logits_nV, temperature, out=out_nV)
        top_n = scaled_nV.amax(-1)
        torch.softmax(scaled_nV, -1, out=out_nV)
        if self._kept_nM.shape[1] >= self.head.vocabulary:
            out_nV.masked_fill_((top_n == -torch.inf)[:, None], 0)
        # The largest softmax is exp(0) / sum: its log is the sum's, without another pass.
        return top_n, -out_nV.amax(-1).log()

    def _normalised(self, temperature: float, top_n: Tensor, log_sum_n: Tensor) -> LogProbs:
        """Log-probabilities over all V, computed relative to the largest logit."""
        picked_nM = self._picked_nM / temperature
        peak_n = torch.maximum(top_n, picked_nM.amax(-1))
        picked_nM -= peak_n[:, None]
        tail_n = (top_n - peak_n + log_sum_n).masked_fill(top_n == -torch.inf, -torch.inf)
        kept_n = picked_nM.masked_fill(~self._kept_nM, -torch.inf).logsumexp(-1)
        total_n = torch.logaddexp(tail_n, kept_n)
        return LogProbs(picked_nM - total_n[:, None], tail_n - total_n)

    def _complement_factor(self, index: int, slope: Slopes) -> Tensor:
        tail_n = self._student[index].tail_n.detach()
        total_n = slope.ids_nM.sum(-1) + slope.tail_n
        return (slope.tail_n - tail_n.exp() * total_n).masked_fill(tail_n == -torch.inf, 0)

    def _picked_gradient(self, index: int, slope: Slopes) -> Tensor:
        total_n1 = (slope.ids_nM.sum(-1) + slope.tail_n)[:, None]
        softmax_nM = self._student[index].ids_nM.detach().exp()
        return slope.ids_nM - softmax_nM.masked_fill(~self._kept_nM, 0) * total_n1

    def _through_soft_cap(self, grad_nV: Tensor, picked_nM: Tensor) -> None:
        """Multiply by d(capped) / d(uncapped) = 1 - (capped / cap)^2."""
        cap, logits_nV = self.head.soft_cap, self._buffers_nV[-1]
        assert cap is not None
        logits_nV.scatter_(1, self._ids_nM, self._picked_nM)
        grad_nV.mul_(logits_nV.div_(cap).square_().neg_().add_(1))
        picked_nM.mul_(1 - (self._picked_nM / cap).square())


def head_logits(hidden_nD: Tensor, head: Head, *, out_nV: Tensor) -> Tensor:
    """Logits into `out`, in its precision; returns it."""
    logits_product(hidden_nD, head.weight_VD, out_NV=out_nV)
    if head.bias_V is not None:
        out_nV.add_(head.bias_V)
    if head.logit_scale != 1:
        out_nV.mul_(head.logit_scale)
    if head.soft_cap is not None:
        out_nV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return out_nV


def _minus_infinity(marked: Tensor, kind: torch.dtype) -> Tensor:
    return torch.zeros(marked.shape, dtype=kind, device=marked.device).masked_fill_(
        marked, -torch.inf
    )

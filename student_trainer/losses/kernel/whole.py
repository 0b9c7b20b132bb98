"""One chunk of positions where all shared ids are kept: nothing is gathered or scattered.

Stands in for `chunk.ChunkWorkspace` where the kept ids are the first K of the vocabulary, in order.

n positions of a chunk   D hidden width   V student vocabulary   K kept ids
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.losses.kernel.chunk import ChunkBuffers, LogProbs, Slopes
from student_trainer.losses.kernel.primitive import MIN_CHUNK_ROWS, Head, precision

# Rows of the largest chunk's logits: fewer read the head too often, more take memory for nothing.
CHUNK_BYTES = 32 * 2**20


def whole_chunk_rows(vocabulary: int) -> int:
    """Positions in a chunk, of which the student's and the teacher's logits [n,V] live at one
    time."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary))


class WholeWorkspace(ChunkBuffers):
    """Buffers [n,V] of log-probabilities, one per temperature, in which chunks take turns."""

    def __init__(
        self,
        head: Head,
        *,
        like_ND: Tensor,
        temperatures: Sequence[float],
        rows: int,
        kept: int,
    ) -> None:
        self.head, self.temperatures, self._kept = head, tuple(temperatures), kept
        self._buffers = [
            like_ND.new_empty((rows, head.vocabulary), dtype=precision(like_ND))
            for _ in range(len(self.temperatures) + (head.soft_cap is not None))
        ]

    def log_probs(self, part: slice) -> list[LogProbs]:
        """Log-probabilities of the kept ids and of all others at every temperature, of a part of
        the chunk."""
        self._buffers_nV = [buffer[part] for buffer in self._chunk_nV]
        logits_nV = self._buffers_nV[-1]
        return [self._softened(logits_nV, index) for index in range(len(self.temperatures))]

    def to_gradient(self, part: slice, slopes: Sequence[Slopes | None]) -> None:
        """Turn what `log_probs` left of the part into the gradient of the product with the head."""
        grad_nV = None
        for index, slope in enumerate(slopes):
            if slope is not None:
                part_nV = self._unsoftened(slope, index)
                grad_nV = part_nV if grad_nV is None else grad_nV.add_(part_nV)
        assert grad_nV is not None, "the loss depends on no temperature"
        if self.head.soft_cap is not None:
            # d(capped) / d(uncapped) = 1 - (capped / cap)^2
            capped_nV = self._buffers_nV[-1].div_(self.head.soft_cap)
            grad_nV.addcmul_(grad_nV * capped_nV, capped_nV, value=-1)
        if grad_nV is not self._buffers_nV[0]:
            self._buffers_nV[0].copy_(grad_nV)

    def _softened(self, logits_nV: Tensor, index: int) -> LogProbs:
        """Into the temperature's buffer; the last one overwrites the logits, unless a soft-cap
        needs them again."""
        out_nV, temperature = self._buffers_nV[index], self.temperatures[index]
        scaled_nV = logits_nV
        if temperature != 1:
            scaled_nV = torch.div(logits_nV, temperature, out=out_nV)
        torch.log_softmax(scaled_nV, -1, out=out_nV)
        return LogProbs(out_nV[:, : self._kept], out_nV[:, self._kept :].logsumexp(-1))

    def _unsoftened(self, slope: Slopes, index: int) -> Tensor:
        """The gradient of the logits before bias: slopes less softmax times their sum, where an id
        outside the kept ones has its share of the tail's slope."""
        log_q_nV = self._buffers_nV[index].detach()
        outside_nU = log_q_nV[:, self._kept :]
        total_n1 = (slope.ids_nM.sum(-1) + slope.tail_n)[:, None]
        share_n1 = None
        if outside_nU.shape[1]:
            share_n1 = slope.tail_n[:, None] * (-outside_nU.logsumexp(-1, keepdim=True)).exp()
        softmax_nV = log_q_nV.exp_()
        if share_n1 is not None:
            outside_nU.mul_(share_n1 - total_n1)
        inside_nK = softmax_nV[:, : self._kept]
        torch.addcmul(slope.ids_nM, inside_nK, total_n1, value=-1, out=inside_nK)
        per_logit = self.head.logit_scale / self.temperatures[index]
        return softmax_nV if per_logit == 1 else softmax_nV.mul_(per_logit)

"""One chunk of positions whose ids are grouped: its logits, log-probabilities of groups, and their
gradient.

Stands in for `kernel.chunk.ChunkWorkspace` where a group is an outcome, at temperature 1. With g
the loss's derivatives with respect to the log-probabilities of groups and of the rest, the logit of
id v in group c has the gradient

    softmax_v (g_c / q_c - sum(g)),   q_c the mass of the group,

so that ids of a group share its gradient as they share its mass, and the loss sees no other change
than that of the groups' masses.

n positions of a chunk   D hidden width   V student vocabulary   M groups and, last, the label
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import LOG_NOTHING
from student_trainer.losses.kernel.chunk import ChunkBuffers, LogProbs, Slopes
from student_trainer.losses.kernel.primitive import Head, precision


class GroupedWorkspace(ChunkBuffers):
    """Two buffers [n,V] in which the chunks of one call take turns (one more where a soft-cap needs
    the logits again)."""

    def __init__(
        self,
        head: Head,
        *,
        like_ND: Tensor,
        temperatures: Sequence[float],
        rows: int,
        group_V: Tensor,
    ) -> None:
        assert tuple(temperatures) == (1.0,), "groups are compared at temperature 1"
        self.head, self._group_V = head, group_V
        ids_V = torch.arange(head.vocabulary, device=group_V.device)
        nothing_V = torch.zeros(ids_V.shape, dtype=precision(like_ND), device=group_V.device)
        self._empty_V = nothing_V.masked_fill_(group_V != ids_V, -torch.inf)  # 0 of names of groups
        shape, kind = (rows, head.vocabulary), precision(like_ND)
        count = 2 + (head.soft_cap is not None)
        self._buffers = [like_ND.new_empty(shape, dtype=kind) for _ in range(count)]

    def log_probs(self, part: slice, ids_nM: Tensor, kept_nM: Tensor) -> list[LogProbs]:
        """Log-probabilities of the groups named, of the label and of all other groups, of a part of
        the chunk; none below e^-80, but of a rest that there is not.

        Leaves the softmax in the first buffer, and -inf in the second at what is named or no group.
        """
        self._softmax_nV, mass_nV = (buffer[part] for buffer in self._chunk_nV[:2])
        self._logits_nV = self._chunk_nV[-1][part]
        self._ids_nM, self._kept_nM = ids_nM, kept_nM
        torch.log_softmax(self._logits_nV, -1, out=self._softmax_nV)
        label_n1 = self._softmax_nV.gather(1, ids_nM[:, -1:])
        self._softmax_nV.exp_()
        mass_nV.copy_(self._empty_V.expand_as(mass_nV))
        mass_nV.scatter_add_(1, self._group_V.expand_as(mass_nV), self._softmax_nV)
        groups_nK = mass_nV.gather(1, ids_nM[:, :-1]).log_().clamp_(min=LOG_NOTHING)
        removed_nM = mass_nV.new_zeros(kept_nM.shape).masked_fill_(kept_nM, -torch.inf)
        mass_nV.scatter_add_(1, ids_nM, removed_nM)
        nothing_n = mass_nV.amax(-1) == -torch.inf
        rest_n = mass_nV.clamp(min=0).sum(-1).log_().clamp_(min=LOG_NOTHING)
        self._student = LogProbs(
            torch.cat([groups_nK, label_n1], dim=1), rest_n.masked_fill(nothing_n, -torch.inf)
        )
        return [self._student]

    def to_gradient(self, part: slice, slopes: Sequence[Slopes | None]) -> None:
        """Turn what `log_probs` left of the part into the gradient of the product with the head."""
        (slope,) = slopes
        assert slope is not None, "the loss depends on no temperature"
        probs, weight_nV = self._student, self._chunk_nV[1][part]
        tail_n = probs.tail_n.detach()
        rest_n = (slope.tail_n * (-tail_n).exp()).masked_fill(tail_n == -torch.inf, 0)
        named_nV = weight_nV == -torch.inf
        torch.where(named_nV, rest_n.new_zeros(()), rest_n[:, None], out=weight_nV)
        own_nM = (slope.ids_nM * (-probs.ids_nM.detach()).exp()).masked_fill_(~self._kept_nM, 0)
        weight_nV.scatter_add_(1, self._ids_nM, own_nM)
        total_n1 = (slope.ids_nM.sum(-1) + slope.tail_n)[:, None]
        grad_nV = self._softmax_nV.mul_(weight_nV.index_select(1, self._group_V).sub_(total_n1))
        grad_nV.scatter_add_(1, self._ids_nM[:, -1:], slope.ids_nM[:, -1:])
        if self.head.logit_scale != 1:
            grad_nV.mul_(self.head.logit_scale)
        if self.head.soft_cap is not None:  # d(capped) / d(uncapped) = 1 - (capped / cap)^2
            capped_nV = self._logits_nV.div_(self.head.soft_cap)
            grad_nV.addcmul_(grad_nV * capped_nV, capped_nV, value=-1)

"""What a teacher's online modules learn (OKD, arXiv 2409.12512), chunk by chunk over positions.

The paper's own formulas were not to be had; this is a reconstruction from its abstract:
L = CE(label, p) + eta D(q, p), with p of the teacher with its modules and q of the student, which
gets no gradient: stay correct, and move towards the student. D is KL(q || p) or KL(p || q), on the
student's likeliest ids and one bucket for all others, so a lower bound of that over the vocabulary.

No tensor of [N, V] elements exists here. Needs torch alone.

N positions with loss   C positions of a chunk   D hidden width   V head rows
M ids that the student names   X the same and all others together
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_service.scoring.scoring import ScoringHead, chunk_size

LOG_NOTHING = -80.0  # in place of the log of no mass, so that a divergence from it is finite
HELD = 4  # tensors of a chunk's logits that its backward pass holds at once


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is learnt at each position."""

    label_N: Tensor  # int64
    ids_NM: Tensor | None = None  # int64; None: the student says nothing
    logprob_NX: Tensor | None = None  # float32, nats; the last is of all other ids

    def at(self, chosen: slice | Tensor, device: torch.device) -> "Lessons":
        """Those of some positions, on a device."""
        parts = (self.label_N, self.ids_NM, self.logprob_NX)
        label_C, *said = (None if part is None else part[chosen].to(device) for part in parts)
        assert label_C is not None, "every position has a label"
        return Lessons(label_C, *said)


def backward(
    hidden_ND: Tensor,
    head: ScoringHead,
    lessons: Lessons,
    *,
    eta: float,
    reverse: bool,
    multiplier: float,
    chunk: int | None = None,
) -> tuple[float, float]:
    """Form the gradient of the loss, summed over positions times `multiplier`, of whatever the
    hidden states come from; returns the sums of both losses, nats. The head gets none."""
    if not len(hidden_ND):
        return 0.0, 0.0
    device = head.weight_VD.device
    rows = chunk or max(16, chunk_size(head.vocab.rows, device.type) // HELD)
    nll = kl = 0.0
    slopes = []
    for start in range(0, len(hidden_ND), rows):
        part = slice(start, start + rows)
        leaf_CD = hidden_ND[part].detach().requires_grad_()
        nll_C, kl_C = losses(head.logits(leaf_CD), lessons.at(part, device), reverse=reverse)
        (slope_CD,) = torch.autograd.grad((nll_C.sum() + eta * kl_C.sum()) * multiplier, leaf_CD)
        slopes.append(slope_CD)
        nll += float(nll_C.detach().double().sum())
        kl += float(kl_C.detach().double().sum())
    hidden_ND.backward(torch.cat(slopes))
    return nll, kl


def losses(logits_CV: Tensor, lessons: Lessons, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """NLL of the labels, and the divergence between student and teacher, 0 where the student says
    nothing [C]."""
    total_C = logits_CV.logsumexp(1)
    nll_C = total_C - logits_CV.gather(1, lessons.label_N[:, None])[:, 0]
    if lessons.ids_NM is None or lessons.logprob_NX is None:
        return nll_C, torch.zeros_like(nll_C)
    ids_CM, log_q_CX = lessons.ids_NM, lessons.logprob_NX
    log_p_CX = logits_CV.gather(1, ids_CM) - total_C[:, None]
    if ids_CM.shape[1] < logits_CV.shape[1]:
        tail_C = logits_CV.scatter(1, ids_CM, -torch.inf).logsumexp(1) - total_C
        log_p_CX = torch.cat([log_p_CX, tail_C[:, None]], dim=1)
    else:  # nothing is left
        log_q_CX = log_q_CX[:, :-1]
    log_q_CX = log_q_CX.clamp(min=LOG_NOTHING)
    first_CX, second_CX = (log_p_CX, log_q_CX) if reverse else (log_q_CX, log_p_CX)
    return nll_C, (first_CX.exp() * (first_CX - second_CX)).sum(1)

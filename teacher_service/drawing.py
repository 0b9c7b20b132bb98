"""Ids drawn by their probability, chunk by chunk over positions: estimates of sums over p that are
unbiased, where the most likely ids alone are not. Needs torch alone.

Both selectors draw from the teacher's distribution at one temperature over the ids that are shared
with the student: rows of the head beyond them are left out, as no student could learn them.

N positions with loss   C positions of a chunk   V shared ids   D hidden width
K ids kept per position   U uniform numbers of a position
Log-probabilities are nats.
"""

from typing import Literal

import torch
from torch import Tensor

from teacher_service.scoring import Head, Selection, chunk_size

# An id so near to the threshold that rounding decides on which side it lies is kept exactly.
MARGIN = 1e-5
NOTHING = torch.finfo(torch.float32).tiny  # a smaller probability is 0


@torch.inference_mode()
def draw(
    hidden_ND: Tensor,
    head: Head,
    label_N: Tensor,
    *,
    uniform_NU: Tensor,
    selector: Literal["threshold", "sampled"],
    top_k: int,
    shared_vocab: int,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Selection:
    """Draw `top_k` ids per position from uniform numbers, float64: one of them for `threshold`,
    `top_k` for `sampled`.

    The log-probabilities are those of the ids kept exactly and -inf for drawn and empty slots;
    `log_tail` is the log-mass that the drawn ids share in equal parts (`threshold`), or of
    everything that was not drawn (`sampled`). The entropy is that of the distribution drawn from;
    the label's log-probability is at temperature 1 over all rows of the head.
    """
    device = head.weight_VD.device
    num, step = len(hidden_ND), chunk or max(16, chunk_size(len(head.weight_VD), device.type) // 2)
    found = Selection(
        ids_NK=torch.empty(num, top_k, dtype=torch.int64, device=device),
        logprobs_NK=torch.empty(num, top_k, device=device),
        log_tail_NS=torch.empty(num, 1, device=device),
        label_logprob_N=torch.empty(num, device=device),
        entropy_N=torch.empty(num, device=device),
    )
    assert found.entropy_N is not None
    for start in range(0, num, step):
        part = slice(start, start + step)
        logits_CV = head.logits(hidden_ND[part])
        label_C1 = label_N[part, None].to(device)
        found.label_logprob_N[part] = logits_CV.gather(1, label_C1)[:, 0] - logits_CV.logsumexp(1)
        log_p_CV = (logits_CV[:, :shared_vocab] / temperature).log_softmax(1)
        p_CV = log_p_CV.exp()
        found.entropy_N[part] = torch.special.entr(p_CV).sum(1)
        log_p_CV.masked_fill_(p_CV < NOTHING, -torch.inf)
        draws = _threshold if selector == "threshold" else _sampled
        ids_CK, logprobs_CK, log_tail_C = draws(log_p_CV, uniform_NU[part].to(device), top_k)
        found.ids_NK[part], found.logprobs_NK[part] = ids_CK, logprobs_CK
        found.log_tail_NS[part, 0] = log_tail_C
    return found


def _threshold(log_p_CV: Tensor, uniform_C1: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sampling with probability proportional to size, of fixed size (Madow 1949).

    With the probabilities sorted and T_h the mass after the first h, the head is the smallest h
    with p_(h+1) < tau = T_h / (size - h). It is kept exactly; of the rest, in the order of ids,
    those that cover the points (u + j) tau, j < size - h, are kept with the weight tau.
    """
    top_CK, ids_CK = log_p_CV.topk(size, sorted=True)
    place_K = torch.arange(size, device=log_p_CV.device)
    num_exact_C1, log_tail_C = _head(log_p_CV, top_CK, ids_CK)
    exact_CK = place_K < num_exact_C1
    rest_CV = log_p_CV.scatter_(1, ids_CK, top_CK.masked_fill(exact_CK, -torch.inf))
    sums_CV = _running_sums(rest_CV)
    step_C1 = sums_CV[:, -1:] / (size - num_exact_C1).clamp(min=1)
    points_CK = (uniform_C1 + (place_K - num_exact_C1).clamp(min=0)) * step_C1
    drawn_CK = _covering(sums_CV, points_CK)
    filled_CK = exact_CK | (num_exact_C1 == size)  # without a rest the last slots stay empty
    return (
        torch.where(filled_CK, ids_CK, drawn_CK),
        top_CK.masked_fill(~exact_CK, -torch.inf),
        log_tail_C,
    )


def _head(log_p_CV: Tensor, top_CK: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """How many ids are kept exactly [C, 1], and the log-mass of all others [C].

    Masses are summed from the smallest up, from the exact mass outside the top ids on. Where that
    is 0, everything is in the head; elsewhere at least one slot is left to draw.
    """
    size = top_CK.shape[1]
    beyond_C = log_p_CV.scatter(1, ids_CK, -torch.inf).logsumexp(1).double().exp()
    p_CK = top_CK.double().exp()
    place_K = torch.arange(size, device=top_CK.device)
    after_CK = p_CK.flip(1).cumsum(1).flip(1) + beyond_C[:, None]  # T_h at place h
    too_large_CK = p_CK * (size - place_K) * (1 + MARGIN) >= after_CK
    num_C = (too_large_CK * (place_K + 1)).amax(1)
    num_C = torch.where(beyond_C > 0, num_C.clamp(max=size - 1), size)
    tail_CK1 = torch.cat([after_CK, torch.zeros_like(after_CK[:, :1])], dim=1)
    return num_C[:, None], tail_CK1.gather(1, num_C[:, None])[:, 0].log().clamp(max=0.0)


def _sampled(log_p_CV: Tensor, uniform_CK: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Independent draws with replacement, each of weight 1 / size (arXiv 2503.16870)."""
    sums_CV = _running_sums(log_p_CV)
    ids_CK = _covering(sums_CV, uniform_CK * sums_CV[:, -1:])
    log_tail_C = log_p_CV.scatter(1, ids_CK, -torch.inf).logsumexp(1)
    nothing_CK = torch.full((len(ids_CK), size), -torch.inf, device=ids_CK.device)
    return ids_CK, nothing_CK, log_tail_C.clamp(max=0.0)


def _running_sums(log_p_CV: Tensor) -> Tensor:
    """Of p over ids in float64, up to a factor; 0 where there is nothing."""
    top_C1 = log_p_CV.amax(1, keepdim=True)
    p_CV = (log_p_CV - top_C1.masked_fill(top_C1 == -torch.inf, 0)).exp()
    return p_CV.cumsum(1, dtype=torch.float64)


def _covering(sums_CV: Tensor, points_CK: Tensor) -> Tensor:
    """The id whose stretch of the running sums each point falls into."""
    last_C1 = torch.nextafter(sums_CV[:, -1:], torch.zeros_like(sums_CV[:, -1:]))
    ids_CK = torch.searchsorted(sums_CV, torch.minimum(points_CK, last_C1), right=True)
    return ids_CK.clamp(max=sums_CV.shape[1] - 1)

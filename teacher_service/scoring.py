"""From hidden states to what a teacher ships, chunk by chunk over positions.

No tensor of [N, V] elements exists here unless top_k is the whole vocabulary. Needs torch alone.

N positions with loss   C positions of a chunk   V head rows   D hidden width
K ids kept per position   S temperatures
Log-probabilities are nats, normalised over all V rows of the head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}  # elements of a chunk's logits


@dataclass(frozen=True, slots=True)
class Head:
    """The product from a hidden state to logits: weight, bias, scale, then soft-cap."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Float32 logits [C, V], multiplied in the head's own precision as the model does."""
        hidden_CD = hidden_CD.to(self.weight_VD.device, self.weight_VD.dtype)
        logits_CV = torch.nn.functional.linear(hidden_CD, self.weight_VD, self.bias_V).float()
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.soft_cap is not None:
            logits_CV = torch.tanh(logits_CV / self.soft_cap) * self.soft_cap
        return logits_CV


@dataclass(frozen=True, slots=True)
class Selection:
    """The most likely ids of each position and exact masses around them."""

    ids_NK: Tensor  # int64, most likely first; ascending where all are kept
    logprobs_NK: Tensor  # float32
    log_tail_NS: Tensor  # float32; -inf where nothing is left
    label_logprob_N: Tensor  # float32
    entropy_N: Tensor | None = None  # float32, at temperature 1; None where it is not asked for


def chunk_size(vocab_rows: int, device: str) -> int:
    """Positions of a chunk, so that its logits take 32 MiB on CPU and 256 MiB on GPU."""
    return max(16, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // vocab_rows)


@torch.inference_mode()
def select(
    hidden_ND: Tensor,
    head: Head,
    label_N: Tensor,
    *,
    top_k: int,
    shared_vocab: int,
    temperatures: tuple[float, ...] = (1.0,),
    entropy: bool = False,
    chunk: int | None = None,
) -> Selection:
    """Keep the top_k ids below `shared_vocab`, the label's log-probability, the tail masses and,
    if asked, the entropy over all V rows.

    `log_tail` is a logsumexp over the complement of the kept ids, computed from the logits at
    each temperature; rows of the head beyond the shared vocabulary belong to it.
    """
    device = head.weight_VD.device
    num, step = len(hidden_ND), chunk or chunk_size(len(head.weight_VD), device.type)
    kept = Selection(
        ids_NK=torch.empty(num, top_k, dtype=torch.int64, device=device),
        logprobs_NK=torch.empty(num, top_k, device=device),
        log_tail_NS=torch.empty(num, len(temperatures), device=device),
        label_logprob_N=torch.empty(num, device=device),
        entropy_N=torch.empty(num, device=device) if entropy else None,
    )
    for start in range(0, num, step):
        part = slice(start, start + step)
        logits_CV = head.logits(hidden_ND[part])
        _select_chunk(logits_CV, label_N[part], kept, part, shared_vocab, temperatures)
    return kept


def _select_chunk(
    logits_CV: Tensor,
    label_C: Tensor,
    kept: Selection,
    part: slice,
    shared_vocab: int,
    temperatures: tuple[float, ...],
) -> None:
    """Fill `part` of `kept`; the logits are overwritten.

    The whole mass is that of the kept ids plus that of the complement: one pass over V each.
    """
    top_k = kept.ids_NK.shape[1]
    if top_k == shared_vocab:
        logits_CK = logits_CV[:, :shared_vocab].clone()
        ids_CK = torch.arange(top_k, device=logits_CV.device).expand(len(logits_CV), -1)
    else:
        logits_CK, ids_CK = logits_CV[:, :shared_vocab].topk(top_k, sorted=True)
    label_C = logits_CV.gather(1, label_C[:, None].to(logits_CV.device))[:, 0]
    if kept.entropy_N is not None:
        kept.entropy_N[part] = torch.special.entr(logits_CV.softmax(1)).sum(1)
    rest_CV = logits_CV.scatter_(1, ids_CK, float("-inf"))
    masses = {t: _log_masses(logits_CK, rest_CV, t) for t in {1.0, *temperatures}}
    for column, temperature in enumerate(temperatures):
        tail_C, whole_C = masses[temperature]
        kept.log_tail_NS[part, column] = (tail_C - whole_C).clamp(max=0.0)
    whole_C = masses[1.0][1]
    kept.ids_NK[part] = ids_CK
    kept.logprobs_NK[part] = logits_CK - whole_C[:, None]
    kept.label_logprob_N[part] = label_C - whole_C


def _log_masses(logits_CK: Tensor, rest_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-mass of the complement and of everything, before normalisation."""
    if temperature != 1.0:
        logits_CK, rest_CV = logits_CK / temperature, rest_CV / temperature
    tail_C = rest_CV.logsumexp(1)
    return tail_C, torch.logaddexp(logits_CK.logsumexp(1), tail_C)

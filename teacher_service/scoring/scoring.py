"""From hidden states to what a teacher ships, chunk by chunk over positions.

No tensor of [N, V] elements exists here unless num_ids is the whole vocabulary. Needs torch alone.

N positions with loss   C positions of a chunk   D hidden width
V head rows, of a sharded head those that this process holds
K ids kept per position   M of them named by the student, O others   S temperatures
X rows or ids of a part
Log-probabilities are nats, normalised over all V rows of the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teacher_service.scoring.vocab import Vocab, VocabShard

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}  # elements of a chunk's logits
CACHED_LOGITS = 2**20  # elements of the logits of a few positions, so that a CPU's caches hold them
OWN_CACHE_LOGITS = 2**17  # the same of a few rows, so that the cache of one core does


@dataclass(frozen=True, slots=True)
class ScoringHead:
    """The product from a hidden state to logits: weight, bias, scale, then soft-cap."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    shard: VocabShard | None = None  # which rows of a sharded head weight and bias are

    @property
    def vocab(self) -> Vocab:
        """The ids, as far as this process holds their rows."""
        return self.shard or Vocab(len(self.weight_VD))

    def whole(self) -> "ScoringHead":
        """The head with all its rows here; every process of a group takes part."""
        if self.shard is None:
            return self
        weight_VD = self.shard.every(self.weight_VD.T).T.contiguous()
        bias_V = None if self.bias_V is None else self.shard.every(self.bias_V[None])[0]
        return replace(self, weight_VD=weight_VD, bias_V=bias_V, shard=None)

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
    """The most likely ids of each position, or some that were named and the most likely others, and
    exact masses around them."""

    ids_NK: Tensor  # int64, named ones first, then most likely first; ascending where all are kept
    logprobs_NK: Tensor  # float32
    log_tail_NS: Tensor  # float32; -inf where nothing is left
    label_logprob_N: Tensor  # float32
    entropy_N: Tensor | None = None  # float32, at temperature 1; None where it is not asked for


def chunk_size(vocab_rows: int, device: str) -> int:
    """Positions of a chunk, so that its logits take 32 MiB on CPU and 256 MiB on GPU."""
    return max(16, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // vocab_rows)


def logits_in_parts(
    hidden_ND: Tensor, head: ScoringHead, *, chunk: int | None = None, width: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of all positions, to be overwritten: the product with the head is made of a chunk
    of them and, on a CPU, given out a few positions at a time, which stay in its caches.

    `width` is how many numbers of a position are in use at a time, if more than its logits.
    """
    device, widest = head.weight_VD.device.type, head.vocab.widest  # alike in all processes
    width = max(widest, width)
    step = chunk or chunk_size(widest, device)
    few = max(16, CACHED_LOGITS // width) if device == "cpu" else chunk_size(width, device)
    for start in range(0, len(hidden_ND), step):
        first = start
        for logits_CV in head.logits(hidden_ND[start : start + step]).split(few):
            yield slice(first, first + len(logits_CV)), logits_CV
            first += len(logits_CV)


def few_rows(logits_CV: Tensor) -> Iterator[slice]:
    """Rows for one pass over V after the other while a CPU core's own cache holds them; all of them
    on a GPU."""
    num, vocab = (max(1, size) for size in logits_CV.shape)
    step = max(1, OWN_CACHE_LOGITS // vocab) if logits_CV.device.type == "cpu" else num
    for start in range(0, len(logits_CV), step):
        yield slice(start, start + step)


@torch.inference_mode()
def select(
    hidden_ND: Tensor,
    head: ScoringHead,
    label_N: Tensor,
    *,
    num_ids: int,
    shared_vocab: int,
    temperatures: tuple[float, ...] = (1.0,),
    entropy: bool = False,
    named_NM: Tensor | None = None,
    chunk: int | None = None,
) -> Selection:
    """Keep num_ids ids below `shared_vocab`, the label's log-probability, the tail masses and, if
    asked, the entropy over all V rows.

    The ids are the most likely, or those of `named_NM`, which differ from each other at a position
    and are below `shared_vocab`, and the most likely others.

    `log_tail` is a logsumexp over the complement of the kept ids, computed from the logits at
    each temperature; rows of the head beyond the shared vocabulary belong to it.
    """
    device = head.weight_VD.device
    num = len(hidden_ND)
    kept = Selection(
        ids_NK=torch.empty(num, num_ids, dtype=torch.int64, device=device),
        logprobs_NK=torch.empty(num, num_ids, device=device),
        log_tail_NS=torch.empty(num, len(temperatures), device=device),
        label_logprob_N=torch.empty(num, device=device),
        entropy_N=torch.empty(num, device=device) if entropy else None,
    )
    for part, logits_CV in logits_in_parts(hidden_ND, head, chunk=chunk):
        label_C = label_N[part].to(device)
        named_CM = None if named_NM is None else named_NM[part].to(device)
        _select_chunk(
            logits_CV, head.vocab, label_C, named_CM, kept, part, shared_vocab, temperatures
        )
    return kept


def _select_chunk(
    logits_CV: Tensor,
    vocab: Vocab,
    label_C: Tensor,
    named_CM: Tensor | None,
    kept: Selection,
    part: slice,
    shared_vocab: int,
    temperatures: tuple[float, ...],
) -> None:
    """Fill `part` of `kept`; the logits are overwritten.

    The whole mass is that of the kept ids plus that of the complement: one pass over V each.
    """
    label_C = vocab.of(logits_CV, label_C[:, None])[:, 0]
    if kept.entropy_N is not None:
        kept.entropy_N[part] = vocab.entropy(logits_CV)
    num_ids = kept.ids_NK.shape[1]
    logits_CK, ids_CK, peak_C1 = _chosen(logits_CV, vocab, named_CM, num_ids, shared_vocab)
    distinct = sorted({1.0, *temperatures})
    tail_CS = _log_tails(logits_CV, vocab, ids_CK, peak_C1, distinct)
    kept_CS = torch.stack([(logits_CK / t).logsumexp(1) for t in distinct], dim=1)
    whole_CS = torch.logaddexp(kept_CS, tail_CS)
    asked = [distinct.index(t) for t in temperatures]
    kept.log_tail_NS[part] = (tail_CS - whole_CS)[:, asked].clamp(max=0.0)
    whole_C = whole_CS[:, distinct.index(1.0)]
    kept.ids_NK[part] = ids_CK
    kept.logprobs_NK[part] = logits_CK - whole_C[:, None]
    kept.label_logprob_N[part] = label_C - whole_C


def _chosen(
    logits_CV: Tensor, vocab: Vocab, named_CM: Tensor | None, num_ids: int, shared_vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and ids of what is kept [C, K], and the largest finite logit of all others [C, 1];
    the logits of named ids are overwritten."""
    shared_CV, beyond_CV = vocab.split(logits_CV, shared_vocab)
    if num_ids == shared_vocab:
        ids_CK = torch.arange(num_ids, device=logits_CV.device).expand(len(logits_CV), -1)
        return vocab.every(shared_CV), ids_CK, vocab.peak(peak_of(beyond_CV))
    if named_CM is None:
        ranked_CX, ids_CX = vocab.largest(shared_CV, num_ids + 1)
    else:
        named_logits_CM = vocab.of(logits_CV, named_CM)
        vocab.put_(logits_CV, named_CM, float("-inf"))
        others_CX, ids_CX = vocab.largest(shared_CV, num_ids + 1 - named_CM.shape[1])
        ranked_CX = torch.cat([named_logits_CM, others_CX], dim=1)
        ids_CX = torch.cat([named_CM, ids_CX], dim=1)
    peak_C1 = torch.maximum(peak_of(ranked_CX[:, num_ids:]), vocab.peak(peak_of(beyond_CV)))
    return ranked_CX[:, :num_ids], ids_CX[:, :num_ids], peak_C1


def peak_of(logits_CX: Tensor) -> Tensor:
    """The largest [C, 1], or the least finite number where there is none above it."""
    least = torch.finfo(logits_CX.dtype).min
    if logits_CX.shape[1] == 0:
        return logits_CX.new_full((len(logits_CX), 1), least)
    return logits_CX.amax(1, keepdim=True).clamp(min=least)


def _log_tails(
    logits_CV: Tensor, vocab: Vocab, ids_CK: Tensor, peak_C1: Tensor, temperatures: list[float]
) -> Tensor:
    """Log-masses [C, S] of all but the kept ids, the largest of which has the logit `peak`; the
    logits are overwritten.

    What is kept is taken out after `exp`, which is several times slower on infinities.
    """
    tail_CS = logits_CV.new_empty(len(logits_CV), len(temperatures))
    for rows in few_rows(logits_CV):
        rest_XV = logits_CV[rows].sub_(peak_C1[rows])
        for column, temperature in enumerate(temperatures):
            mass_XV = torch.exp(rest_XV if temperature == 1.0 else rest_XV / temperature)
            tail_CS[rows, column] = vocab.put_(mass_XV, ids_CK[rows], 0.0).sum(1)
    return vocab.sum(tail_CS).log_() + torch.cat([peak_C1 / t for t in temperatures], dim=1)

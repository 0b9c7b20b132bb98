"""The student's head, and log-probabilities of chosen ids with the exact mass of all others.

`gathered_log_softmax` is the reference: plain autograd, recomputed chunk by chunk in the backward
pass. `fused` computes the same with the gradient formed in the forward pass. Neither lets a tensor
of positions x vocabulary outlive a chunk.

N positions   D hidden width   V student vocabulary   M ids asked about per position
S temperatures
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20
# Below this the head is read from memory too often for the work done on it.
MIN_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Head:
    """How a model turns a hidden state into logits.

    logits = logit_scale * (weight h + bias), then soft_cap * tanh(logits / soft_cap) if capped.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Number of rows of the head, V."""
        return self.weight_VD.shape[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Differentiable logits [N,V] in `precision`."""
        kind = precision(hidden_ND)
        bias_V = None if self.bias_V is None else self.bias_V.to(kind)
        logits_NV = linear(hidden_ND.to(kind), self.weight_VD.to(kind), bias_V) * self.logit_scale
        if self.soft_cap is None:
            return logits_NV
        return torch.tanh(logits_NV / self.soft_cap) * self.soft_cap


def precision(hidden_ND: Tensor) -> torch.dtype:
    """What logits are computed in: float32, or float64 for float64 states."""
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def chunks(num_rows: int, *, rows_per_chunk: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal length, at least one, none above `rows_per_chunk`."""
    count = max(1, -(-num_rows // rows_per_chunk))
    edges = [num_rows * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def default_chunk_rows(vocabulary: int, *, num_ids: int) -> int:
    """Positions in a chunk: some tens of MB of float32 logits, fewer where many ids are kept."""
    floats = vocabulary + 8 * num_ids
    smallest = -(-MIN_CHUNK_ROWS * vocabulary // floats)
    return max(1, smallest, CHUNK_BYTES // (4 * floats))


def gathered_log_softmax(
    hidden_ND: Tensor,
    head: Head,
    *,
    ids_NM: Tensor,
    kept_NM: Tensor,
    temperatures: Sequence[float] = (1.0,),
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Student log-probabilities of `ids` [S,N,M] and the log-mass outside the kept ones [S,N].

    Normalised over all V ids. `kept` marks each id of the selection once; unmarked columns are
    along for the ride (a label), may repeat kept ids, and belong to the tail where they do not.
    The tail is a logsumexp over the complement, never 1 - sum; it is -inf, with a zero gradient,
    where all V ids are kept.
    """
    rows_per_chunk = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=ids_NM.shape[1])
    parts = [
        checkpoint(
            _gathered,
            hidden_ND[rows],
            head,
            ids_NM=ids_NM[rows],
            kept_NM=kept_NM[rows],
            temperatures=temperatures,
            use_reentrant=False,
        )
        for rows in chunks(len(hidden_ND), rows_per_chunk=rows_per_chunk)
    ]
    log_q, log_tail = zip(*parts, strict=True)
    return torch.cat(log_q, dim=1), torch.cat(log_tail, dim=1)


def _gathered(
    hidden_ND: Tensor,
    head: Head,
    *,
    ids_NM: Tensor,
    kept_NM: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    logits_NV = head.logits(hidden_ND)
    inside_NV = torch.zeros_like(logits_NV).scatter_add_(1, ids_NM, kept_NM.to(logits_NV.dtype)) > 0
    full_N1 = inside_NV.all(-1, keepdim=True)
    log_q, log_tail = [], []
    for temperature in temperatures:
        scaled_NV = logits_NV / temperature
        total_N = scaled_NV.logsumexp(-1)
        # A row without a complement is left unmasked here and set to -inf after, so that its
        # gradient is zero and not NaN.
        outside_N = scaled_NV.masked_fill(inside_NV & ~full_N1, -torch.inf).logsumexp(-1)
        log_q.append(scaled_NV.gather(1, ids_NM) - total_N[:, None])
        log_tail.append((outside_N - total_N).masked_fill(full_N1[:, 0], -torch.inf))
    return torch.stack(log_q), torch.stack(log_tail)

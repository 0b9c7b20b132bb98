"""The likeliest id of each position: how sure a model is of it, and whether it is the label.

N positions   n positions of a chunk   D hidden width   V vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from student_trainer.losses.kernel.chunk import head_logits
from student_trainer.losses.kernel.primitive import Head, chunks, default_chunk_rows, precision


class Top1(NamedTuple):
    """Of every position."""

    confidence_N: Tensor  # probability of the likeliest id, at temperature 1
    is_right_N: Tensor  # bool; of equally likely ids the smallest counts
    id_N: Tensor  # int64, the likeliest


@torch.no_grad()
def top1(hidden_ND: Tensor, head: Head, label_N: Tensor, *, chunk_rows: int | None = None) -> Top1:
    """From states and the head they pass through, chunk by chunk over positions."""
    rows_per_chunk = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=1)
    confidence_N = hidden_ND.new_empty(len(hidden_ND), dtype=precision(hidden_ND))
    is_right_N = torch.empty_like(confidence_N, dtype=torch.bool)
    id_N = torch.empty_like(label_N)
    for rows in chunks(len(hidden_ND), rows_per_chunk=rows_per_chunk):
        hidden_nD = hidden_ND[rows]
        buffer_nV = hidden_nD.new_empty((len(hidden_nD), head.vocabulary), dtype=confidence_N.dtype)
        logits_nV = head_logits(hidden_nD, head, out_nV=buffer_nV)
        highest_n, id_n = logits_nV.max(-1)
        confidence_N[rows] = (highest_n - logits_nV.logsumexp(-1)).exp()
        is_right_N[rows], id_N[rows] = id_n == label_N[rows], id_n
    return Top1(confidence_N, is_right_N, id_N)

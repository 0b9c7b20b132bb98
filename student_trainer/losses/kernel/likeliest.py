"""The student's likeliest ids at each position, chunk by chunk over positions.

N positions   n positions of a chunk   D hidden width   V student vocabulary   M ids per position
X the same and all others together
"""

import torch
from torch import Tensor

from student_trainer.losses.kernel.chunk import head_logits
from student_trainer.losses.kernel.primitive import Head, chunks, default_chunk_rows, precision


@torch.no_grad()
def likeliest_ids(
    hidden_ND: Tensor, head: Head, *, count: int, shared_vocab: int, chunk_rows: int | None = None
) -> Tensor:
    """The `count` likeliest ids below `shared_vocab` [N, M], int64, likeliest first."""
    rows_per_chunk = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=count)
    slices = list(chunks(len(hidden_ND), rows_per_chunk=rows_per_chunk))
    longest = max(rows.stop - rows.start for rows in slices)
    buffer_nV = hidden_ND.new_empty((longest, head.vocabulary), dtype=precision(hidden_ND))
    ids_NM = hidden_ND.new_empty((len(hidden_ND), count), dtype=torch.int64)
    for rows in slices:
        hidden_nD = hidden_ND[rows]
        logits_nV = head_logits(hidden_nD, head, out_nV=buffer_nV[: len(hidden_nD)])
        ids_NM[rows] = logits_nV[:, :shared_vocab].topk(count).indices
    return ids_NM


@torch.no_grad()
def likeliest_logprobs(
    hidden_ND: Tensor, head: Head, *, count: int, shared_vocab: int, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest ids below `shared_vocab` [N, M], and the log-probabilities of each and
    of all others together [N, X], nats, normalised over all V ids; -inf where nothing is left."""
    ids_NM = likeliest_ids(
        hidden_ND, head, count=count, shared_vocab=shared_vocab, chunk_rows=chunk_rows
    )
    kind = precision(hidden_ND)
    rows_per_chunk = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=count)
    logprob_NX = hidden_ND.new_empty((len(hidden_ND), count + 1), dtype=kind)
    for rows in chunks(len(hidden_ND), rows_per_chunk=rows_per_chunk):
        hidden_nD, ids_nM = hidden_ND[rows], ids_NM[rows]
        buffer_nV = hidden_ND.new_empty((len(hidden_nD), head.vocabulary), dtype=kind)
        logits_nV = head_logits(hidden_nD, head, out_nV=buffer_nV)
        total_n1 = logits_nV.logsumexp(1, keepdim=True)
        kept_nM = logits_nV.gather(1, ids_nM)
        rest_n1 = logits_nV.scatter_(1, ids_nM, -torch.inf).logsumexp(1, keepdim=True)
        logprob_NX[rows] = torch.cat([kept_nM, rest_n1], dim=1) - total_n1
    return ids_NM, logprob_NX

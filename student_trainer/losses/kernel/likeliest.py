"""The student's likeliest ids at each position, chunk by chunk over positions.

N positions   n positions of a chunk   D hidden width   V student vocabulary   M ids per position
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

"""The student's entropy at each position, chunk by chunk over positions.

N positions   n positions of a chunk   D hidden width   V student vocabulary
"""

import torch
from torch import Tensor

from student_trainer.losses.kernel.chunk import head_logits
from student_trainer.losses.kernel.primitive import Head, chunks, default_chunk_rows, precision


@torch.no_grad()
def entropies(hidden_ND: Tensor, head: Head, *, chunk_rows: int | None = None) -> Tensor:
    """Entropy over the whole vocabulary at temperature 1, nats [N]."""
    rows_per_chunk = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=1)
    entropy_N = hidden_ND.new_empty(len(hidden_ND), dtype=precision(hidden_ND))
    for rows in chunks(len(hidden_ND), rows_per_chunk=rows_per_chunk):
        hidden_nD = hidden_ND[rows]
        buffer_nV = hidden_nD.new_empty((len(hidden_nD), head.vocabulary), dtype=entropy_N.dtype)
        log_q_nV = head_logits(hidden_nD, head, out_nV=buffer_nV).log_softmax(-1)
        entropy_N[rows] = torch.special.entr(log_q_nV.exp()).sum(-1)
    return entropy_N

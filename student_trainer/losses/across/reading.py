"""The arrays of a batch whose teacher has another tokenizer, and what they need of the student.

The teacher's part is `student_trainer.tasks.token_pairing`'s.

N positions with loss   D student width   K ids of the teacher per position   S temperatures
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from student_trainer.losses.across.matched import ByBytes, ByRank
from student_trainer.losses.across.spans import Spans, rest_of_spans
from student_trainer.losses.kernel.likeliest import likeliest_ids
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.token_losses import evaluate_tokens

COMPARED = "compared_share"  # what is reported of positions, a field of `DomainMetrics`


def compared(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which positions are compared with what the teacher says [N], by the name of the report: by
    rank, those at which both models begin a token after the same bytes; else those of them at which
    the student has one of the teacher's outcomes, and those of spans of several tokens. Nothing of
    a batch of one tokenizer."""
    if "compared_N" not in batch:
        return {}
    if "ranked_NK" in batch:
        return {COMPARED: batch["compared_N"]}
    found_N = batch["compared_N"] & ~batch["absent_NK"].all(-1)
    if "span_share_N" in batch:
        found_N = found_N | (batch["span_share_N"] > 0)
    return {COMPARED: found_N}


def matched(batch: Mapping[str, Tensor], temperatures: tuple[float, ...]) -> ByBytes | ByRank:
    """The teacher's part of a batch, by rank where the student's likeliest ids are there; column s
    of the tails belongs to temperature s."""
    shipped = (batch["logprobs_NK"], batch["log_tail_NS"], temperatures)
    if "ranked_NK" in batch:
        absent_NK = (batch["ranked_NK"] < 0) | ~batch["compared_N"][:, None]
        return ByRank(batch["ranked_NK"].clamp(min=0), absent_NK, *shipped)
    spans = None
    if "span_rest_N" in batch:
        spans = Spans(batch["span_logprob_N"], batch["span_rest_N"], batch["span_share_N"])
    return ByBytes(batch["ids_NK"], batch["absent_NK"], *shipped, spans, batch.get("group_V"))


@torch.no_grad()
def of_student(
    hidden_ND: Tensor, head: Head, batch: Mapping[str, Tensor], *, by_rank: bool
) -> dict[str, Tensor]:
    """What is asked of the student before its losses, a product with the head: its likeliest ids,
    -1 beyond its vocabulary, or the log-probability of the rest of each position's span. Nothing
    where the teacher has its tokenizer, or no span has several tokens."""
    if by_rank and "absent_NK" in batch:
        size = batch["absent_NK"].shape[1]
        count = min(size, head.vocabulary)
        ids_NK = likeliest_ids(hidden_ND, head, count=count, shared_vocab=head.vocabulary)
        return {"ranked_NK": pad(ids_NK, (0, size - count), value=-1)}
    if "span_N" not in batch:
        return {}
    nll_N, _ = evaluate_tokens(hidden_ND, head, label_N=batch["label_N"])
    return {"span_rest_N": rest_of_spans(-nll_N, batch["span_N"])}

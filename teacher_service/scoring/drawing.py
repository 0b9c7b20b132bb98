"""Ids drawn by their probability, chunk by chunk over positions: estimates of sums over p that are
unbiased, where the most likely ids alone are not. Needs torch alone.

Both selectors draw from the teacher's distribution at one temperature over the ids that are shared
with the student: rows of the head beyond them are left out, as no student could learn them.

N positions with loss   C positions of a chunk   D hidden width
V shared ids, of a sharded head those whose rows this process holds
K ids kept per position   U uniform numbers of a position   B blocks of neighbouring ids
Log-probabilities are nats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_service.scoring.scoring import (
    ScoringHead,
    Selection,
    few_rows,
    logits_in_parts,
    peak_of,
)
from teacher_service.scoring.vocab import Running, Vocab

# An id so near to the threshold that rounding decides on which side it lies is kept exactly.
MARGIN = 1e-4
# Of a probability over the largest one; a smaller one, which float32 cannot hold well, is 0.
LEAST_LOG_RATIO = math.log(torch.finfo(torch.float32).tiny)
LOG_NOTHING = -200.0  # exp of it is 0 in float32
BLOCK_BITS = 4
BLOCK = 2**BLOCK_BITS  # neighbouring ids that running sums pass over in one step


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn at the positions of a chunk."""

    ids_CK: Tensor  # int64
    logprobs_CK: Tensor  # float32, of the ids kept exactly; -inf for the others
    log_tail_C: Tensor  # float64
    log_sum_C: Tensor  # float64, of exp(logits / temperature) over the shared ids
    entropy_C: Tensor  # float64


@torch.inference_mode()
def draw(
    hidden_ND: Tensor,
    head: ScoringHead,
    label_N: Tensor,
    *,
    uniform_NU: Tensor,
    selector: str,
    num_ids: int,
    shared_vocab: int,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Selection:
    """Draw `num_ids` ids per position from uniform numbers, float64: one of them for `threshold`,
    `num_ids` for `sampled`.

    The log-probabilities are those of the ids kept exactly and -inf for drawn and empty slots;
    `log_tail` is the log-mass that the drawn ids share in equal parts (`threshold`), or of
    everything that was not drawn (`sampled`). The entropy is that of the distribution drawn from;
    the label's log-probability is at temperature 1 over all rows of the head.
    """
    device = head.weight_VD.device
    num = len(hidden_ND)
    found = Selection(
        ids_NK=torch.empty(num, num_ids, dtype=torch.int64, device=device),
        logprobs_NK=torch.empty(num, num_ids, device=device),
        log_tail_NS=torch.empty(num, 1, device=device),
        label_logprob_N=torch.empty(num, device=device),
        entropy_N=torch.empty(num, device=device),
    )
    draws, vocab = DRAWINGS[selector], head.vocab
    logits = logits_in_parts(hidden_ND, head, chunk=chunk, width=BLOCK * num_ids)
    for part, logits_CV in logits:
        label_C, uniform_CU = label_N[part].to(device), uniform_NU[part].to(device)
        label_C = vocab.of(logits_CV, label_C[:, None])[:, 0]
        from_all = temperature == 1.0 and shared_vocab == vocab.rows
        log_sum_C = None if from_all else vocab.logsumexp(logits_CV)
        shared_CV, _ = vocab.split(logits_CV, shared_vocab)
        chosen = draws(shared_CV, vocab, uniform_CU, num_ids, temperature)
        _keep(chosen, found, part)
        log_sum_C = chosen.log_sum_C if log_sum_C is None else log_sum_C
        found.label_logprob_N[part] = label_C - log_sum_C
    return found


def _keep(chosen: Drawn, found: Selection, part: slice) -> None:
    assert found.entropy_N is not None
    found.ids_NK[part], found.logprobs_NK[part] = chosen.ids_CK, chosen.logprobs_CK
    found.log_tail_NS[part, 0] = chosen.log_tail_C.clamp(max=0.0)
    found.entropy_N[part] = chosen.entropy_C


def _threshold(
    logits_CV: Tensor, vocab: Vocab, uniform_C1: Tensor, size: int, temperature: float
) -> Drawn:
    """Sampling with probability proportional to size, of fixed size (Madow 1949).

    With the probabilities sorted and T_h the mass after the first h, the head is the smallest h
    with p_(h+1) < tau = T_h / (size - h). It is kept exactly; of the rest, in the order of ids,
    those that cover the points (u + j) tau, j < size - h, are kept with the weight tau. Overwrites
    the logits.
    """
    top_CK, ids_CK = vocab.largest(logits_CV, size)
    peak_C1 = top_CK[:, :1]
    # `ratio` stands for probabilities over the largest one.
    top_CK = _log_ratio(top_CK - peak_C1, temperature)
    ratio_CV, sum_CB, moment_C = _ratios(logits_CV, vocab, peak_C1, temperature, without_CK=ids_CK)
    beyond_C = vocab.sum(sum_CB.sum(1))
    top_ratio_CK = top_CK.exp()
    num_exact_C1, tail_C = _kept_exactly(top_ratio_CK.double(), beyond_C)
    place_K = torch.arange(size, device=logits_CV.device)
    exact_CK = place_K < num_exact_C1
    rest_CK = top_ratio_CK.masked_fill(exact_CK, 0.0)
    vocab.put_(ratio_CV, ids_CK, rest_CK)
    vocab.add_to_blocks_(sum_CB, ids_CK, rest_CK.double(), BLOCK_BITS)
    running, count_C1 = vocab.running(sum_CB), (size - num_exact_C1).clamp(min=1)
    point_CK = (place_K - num_exact_C1).clamp(min=0)
    block_CK = _blocks_at_steps(running, uniform_C1, count_C1, size).gather(1, point_CK)
    point_CK = (point_CK + uniform_C1) * (running.whole_C1 / count_C1)
    found_CK = _found_in(ratio_CV, sum_CB, running.ends_CB, block_CK, point_CK)
    drawn_CK = vocab.found(found_CK, _below(point_CK, running.whole_C1), running)
    filled_CK = exact_CK | (num_exact_C1 == size)  # without a rest the last slots stay empty
    exact_CK &= top_CK > LOG_NOTHING
    return _normalised(
        torch.where(filled_CK, ids_CK, drawn_CK),
        top_CK.masked_fill(~exact_CK, -torch.inf),
        tail_C=tail_C,
        sum_C=beyond_C + top_ratio_CK.double().sum(1),
        moment_C=moment_C,
        log_peak_C=peak_C1[:, 0] / temperature,
    )


def _kept_exactly(ratio_CK: Tensor, beyond_C: Tensor) -> tuple[Tensor, Tensor]:
    """How many ids are kept exactly [C, 1], and the mass of all others [C], both masses over the
    largest probability.

    Masses are summed from the smallest up, from the exact mass outside the top ids on. Where that
    is 0, everything is in the head; elsewhere at least one slot is left to draw.
    """
    size = ratio_CK.shape[1]
    place_K = torch.arange(size, device=ratio_CK.device)
    after_CK = ratio_CK.flip(1).cumsum(1).flip(1) + beyond_C[:, None]  # T_h at place h
    too_large_CK = ratio_CK * (size - place_K) * (1 + MARGIN) >= after_CK
    num_C = (too_large_CK * (place_K + 1)).amax(1)
    num_C = torch.where(beyond_C > 0, num_C.clamp(max=size - 1), size)
    tail_CK1 = torch.cat([after_CK, torch.zeros_like(after_CK[:, :1])], dim=1)
    return num_C[:, None], tail_CK1.gather(1, num_C[:, None])[:, 0]


def _sampled(
    logits_CV: Tensor, vocab: Vocab, uniform_CK: Tensor, size: int, temperature: float
) -> Drawn:
    """Independent draws with replacement, each of weight 1 / size (arXiv 2503.16870). Overwrites
    the logits."""
    peak_C1 = vocab.peak(peak_of(logits_CV))
    none_C0 = torch.empty(len(logits_CV), 0, dtype=torch.int64, device=logits_CV.device)
    ratio_CV, sum_CB, moment_C = _ratios(logits_CV, vocab, peak_C1, temperature, without_CK=none_C0)
    running = vocab.running(sum_CB)
    point_CK = _below(uniform_CK * running.whole_C1, running.whole_C1)
    block_CK = torch.searchsorted(running.ends_CB, point_CK, right=True)
    found_CK = _found_in(ratio_CV, sum_CB, running.ends_CB, block_CK, point_CK)
    ids_CK = vocab.found(found_CK, point_CK, running)
    return _normalised(
        ids_CK,
        torch.full_like(uniform_CK, -torch.inf, dtype=torch.float32),
        tail_C=vocab.sum(vocab.put_(ratio_CV, ids_CK, 0.0).sum(1).double()),
        sum_C=vocab.sum(sum_CB.sum(1)),
        moment_C=moment_C,
        log_peak_C=peak_C1[:, 0] / temperature,
    )


def _normalised(
    ids_CK: Tensor,
    log_ratio_CK: Tensor,
    *,
    tail_C: Tensor,
    sum_C: Tensor,
    moment_C: Tensor,
    log_peak_C: Tensor,
) -> Drawn:
    """From ratios to the largest probability, their tail, sum and moment, to probabilities."""
    log_sum_C = sum_C.log()
    return Drawn(
        ids_CK=ids_CK,
        logprobs_CK=(log_ratio_CK - log_sum_C[:, None]).float(),
        log_tail_C=tail_C.log() - log_sum_C,
        log_sum_C=log_sum_C + log_peak_C,
        entropy_C=log_sum_C - moment_C / sum_C,
    )


def _ratios(
    logits_CV: Tensor, vocab: Vocab, peak_C1: Tensor, temperature: float, *, without_CK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities over the largest one [C, V], zero at the ids `without` and up to whole blocks,
    their block sums [C, B], and the sum of each times its own logarithm [C], of all ids. Overwrites
    the logits: every pass over V counts."""
    num, held = logits_CV.shape
    blocks = max(1, -(-held // BLOCK))
    in_place = logits_CV.is_contiguous() and blocks * BLOCK == held
    ratio_CV = logits_CV if in_place else logits_CV.new_empty(num, blocks * BLOCK)
    ratio_CV[:, held:] = 0
    sum_CB = logits_CV.new_empty(num, blocks, dtype=torch.float64)
    moment_C = logits_CV.new_empty(num, dtype=torch.float64)
    for rows in few_rows(logits_CV):
        log_ratio_XV = _log_ratio(logits_CV[rows] - peak_C1[rows], temperature)
        ratio_XV = torch.exp(log_ratio_XV, out=ratio_CV[rows, :held])
        moment_C[rows] = log_ratio_XV.mul_(ratio_XV).sum(1)
        vocab.put_(ratio_XV, without_CK[rows], 0.0)
        sum_CB[rows] = _block_sums(ratio_CV[rows])
    return ratio_CV, sum_CB, vocab.sum(moment_C)


def _log_ratio(below_CX: Tensor, temperature: float) -> Tensor:
    """Of probabilities to the largest one, from the logits less its own, which are overwritten;
    `LOG_NOTHING` for next to nothing."""
    if temperature != 1.0:
        below_CX.div_(temperature)
    return torch.threshold_(below_CX, LEAST_LOG_RATIO, LOG_NOTHING)


def _block_sums(mass_CV: Tensor) -> Tensor:
    """The mass of every block of neighbouring ids [C, B]."""
    ones_X = mass_CV.new_ones(BLOCK)  # X: places of a block
    return torch.mv(mass_CV.view(-1, BLOCK), ones_X).view(len(mass_CV), -1)


def _blocks_at_steps(running: Running, uniform_C1: Tensor, count_C1: Tensor, size: int) -> Tensor:
    """The blocks that hold the points (u + j) / count of the whole mass, j < size [C, K].

    How many points lie before the end of each block is known without a search, and how many ends
    lie before each point follows by counting. Points from `count` on, beyond the mass, are not
    placed: theirs is the last block that has any.
    """
    ends_CB, whole_C1 = running.ends_CB, running.whole_C1
    before_CB = (ends_CB * (count_C1 / whole_C1)).sub_(uniform_C1).ceil_()
    before_CB = torch.where(ends_CB < whole_C1, before_CB, size).clamp_(0, size).long()
    ends_at_CK = before_CB.new_zeros(len(ends_CB), size + 1)
    ends_at_CK.scatter_add_(1, before_CB, torch.ones_like(before_CB))
    return ends_at_CK.cumsum(1)[:, :size]


def _found_in(
    mass_CV: Tensor, sum_CB: Tensor, ends_CB: Tensor, block_CK: Tensor, point_CK: Tensor
) -> Tensor:
    """The ids [C, K] whose stretches of the running sum hold these points of these blocks.

    Blocks are told apart in float64, ids in one of them, where sums are short, in float32. Nothing
    without mass is ever found.
    """
    num, blocks = sum_CB.shape
    block_CK = block_CK.clamp(max=blocks - 1)  # where there is no mass at all
    within_CK = point_CK - (ends_CB - sum_CB).gather(1, block_CK)
    start_C1 = torch.arange(0, num * blocks, blocks, device=mass_CV.device)[:, None]
    near_YX = mass_CV.view(-1, BLOCK).index_select(0, (start_C1 + block_CK).flatten())
    ends_YX = near_YX.cumsum(1)
    point_Y1 = _below(within_CK.float().view(-1, 1), ends_YX[:, -1:])
    passed_YX = torch.le(ends_YX, point_Y1, out=near_YX)  # as 0.0 and 1.0
    place_CK = _block_sums(passed_YX.view(num, -1)).long()
    return (block_CK << BLOCK_BITS) + place_CK.clamp_(max=BLOCK - 1)


def _below(point: Tensor, end: Tensor) -> Tensor:
    """The points, rounded to within [0, end)."""
    return point.clamp(min=0).minimum(end * (1 - torch.finfo(end.dtype).eps))


DRAWINGS = {"threshold": _threshold, "sampled": _sampled}  # by the selector of the ask

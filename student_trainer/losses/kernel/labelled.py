"""Two distributions with the label of a position on its own, beside kept ids and a tail.

N positions   K ids kept per position   M kept ids and the label
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, log1mexp

# Relative rounding of float32: no difference of probabilities is known better.
ROUNDING = 1e-7


@dataclass(frozen=True, slots=True)
class LabelledBuckets:
    """Log-probabilities of the label, of the kept ids but the label, and of everything else.

    They sum to 1. `others_NK` is -inf where the kept id is the label.
    """

    label_N: Tensor
    log_rest_N: Tensor  # log(1 - probability of the label)
    others_NK: Tensor
    tail_N: Tensor  # neither kept nor the label; -inf where there is nothing


def labelled_teacher(
    teacher: Buckets, *, label_logprob_N: Tensor, is_label_NK: Tensor, student_tail_N: Tensor
) -> LabelledBuckets:
    """The teacher's, from its buckets at temperature 1 and its exact label log-probability.

    Where the label is not kept, its probability is taken out of the tail, in log space, down to
    rounding. The student has no tail where `student_tail_N` is -inf, and then neither has the
    teacher. No outcome that the student could have is at 0, so that reverse stays finite.
    """
    label_N = label_logprob_N.clamp(max=-ROUNDING)
    kept_N = is_label_NK.any(-1)
    log_share_N = torch.where(kept_N, -torch.inf, label_N - teacher.tail_N)
    tail_N = teacher.tail_N + log1mexp(log_share_N.clamp(max=-ROUNDING))
    some = Buckets(teacher.kept_NK, tail_N).without_zeros()
    return LabelledBuckets(
        label_N=label_N,
        log_rest_N=log1mexp(label_N),
        others_NK=some.kept_NK.masked_fill(is_label_NK, -torch.inf),
        tail_N=some.tail_N.masked_fill(student_tail_N == -torch.inf, -torch.inf),
    )


def labelled_student(
    ids_NM: Tensor, fine_tail_N: Tensor, *, is_label_NK: Tensor
) -> LabelledBuckets:
    """The student's, from log-probabilities of the kept ids and, in the last column, the label.

    `fine_tail_N` is over the complement of both, so that nothing is subtracted.
    """
    others_NK = ids_NM[:, :-1].masked_fill(is_label_NK, -torch.inf)
    log_rest_N = torch.cat([others_NK, fine_tail_N[:, None]], dim=1).logsumexp(-1)
    return LabelledBuckets(ids_NM[:, -1], log_rest_N, others_NK, fine_tail_N)

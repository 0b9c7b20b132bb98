"""Token-adaptive teaching on buckets: ATKD (Zhong et al., ACL 2024, arXiv 2402.11890).

With g the label of a position, the KL of two distributions falls into two terms (the paper's
equations for decoupled distillation, exact on any grouping that leaves g on its own):

    KL(p || q) = TKD + UNC * DKD
    UNC = 1 - p_g
    TKD = KL([p_g, 1 - p_g] || [q_g, 1 - q_g])
    DKD = KL(p^ || q^),  p^_j = p_j / (1 - p_g),  q^_j = q_j / (1 - q_g),  j != g

Hard tokens, those of the largest UNC, learn TKD + DKD, easy ones DKD; neither DKD is weighted by
UNC. UNC and TKD are exact; DKD over buckets is a lower bound of the full one.

N positions   K ids kept per position
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, log1mexp, p_log_ratio
from student_trainer.losses.terms.divergences import Divergence

# Below this 1 - p_g is no direction to learn from, only rounding: the token's DKD is dropped.
SMALLEST_UNCERTAINTY = 1e-5
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


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """Which tokens are hard, bool [N], and what a token's value is multiplied by [N]."""

    hard_N: Tensor
    weight_N: Tensor


@dataclass(frozen=True, slots=True)
class Decoupled:
    """UNC, TKD and DKD of each position, nats [N]; DKD is 0 where UNC is below 1e-5."""

    uncertainty_N: Tensor
    tkd_N: Tensor
    dkd_N: Tensor

    def loss(self, hard_N: Tensor) -> Tensor:
        """TKD + DKD on hard tokens, DKD on easy ones [N]."""
        return self.dkd_N + torch.where(hard_N, self.tkd_N, 0)


def decoupled(target: LabelledBuckets, learner: LabelledBuckets) -> Decoupled:
    """The terms of KL(target || learner): target is the teacher, in reverse the student.

    DKD does not see the label, so that its gradient with respect to the label's logit is 0.
    """
    return Decoupled(target.log_rest_N.exp(), tkd(target, learner), dkd(target, learner))


def tkd(target: LabelledBuckets, learner: LabelledBuckets) -> Tensor:
    """KL of the label against everything else, nats [N]: exact whatever is kept."""
    label_N = p_log_ratio(target.label_N, learner.label_N)
    return label_N + p_log_ratio(target.log_rest_N, learner.log_rest_N)


def dkd(target: LabelledBuckets, learner: LabelledBuckets) -> Tensor:
    """KL of everything but the label, nats [N]; 0 where UNC is below 1e-5."""
    p, q = _without_label(target), _without_label(learner)
    dkd_N = p_log_ratio(p.kept_NK, q.kept_NK).sum(-1) + p_log_ratio(p.tail_N, q.tail_N)
    known_N = target.log_rest_N.detach().exp() >= SMALLEST_UNCERTAINTY
    return torch.where(known_N, dkd_N, 0)


# Both terms with their laws, which hold in either direction.
PARTS = {
    "atkd: TKD": Divergence(
        tkd,
        "KL((p_g, 1 - p_g), (q_g, 1 - q_g)), g: the label; reverse: p and q swapped",
        "ATKD, arXiv 2402.11890",
        ("direction",),
    ),
    "atkd: DKD": Divergence(
        dkd,
        "KL(p, q) given that the token is not g; reverse: p and q swapped",
        "ATKD, arXiv 2402.11890",
        ("direction",),
    ),
}


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


def _without_label(buckets: LabelledBuckets) -> Buckets:
    """The distribution given that it is not the label: divided by its own sum, which is 1 - p_g
    up to the rounding of what was shipped."""
    all_N = torch.cat([buckets.others_NK, buckets.tail_N[:, None]], dim=1).logsumexp(-1)
    all_N = torch.where(all_N == -torch.inf, 0, all_N)
    return Buckets(buckets.others_NK - all_N[:, None], buckets.tail_N - all_N)

"""Token-adaptive teaching on buckets: ATKD (Zhong et al., ACL 2024, arXiv 2402.11890).

With g the label of a position, the KL of two distributions falls into two terms (the paper's
equations for decoupled distillation, exact on any grouping that leaves g on its own):

    KL(p || q) = TKD + UNC * DKD
    UNC = 1 - p_g
    TKD = KL([p_g, 1 - p_g] || [q_g, 1 - q_g])
    DKD = KL(p^ || q^),  p^_j = p_j / (1 - p_g),  q^_j = q_j / (1 - q_g),  j != g

Hard tokens, those of the largest UNC, learn TKD + DKD, easy ones DKD; neither DKD is weighted by
UNC. UNC and TKD are exact; DKD over buckets is a lower bound of the full one.

N positions   n positions of a chunk   K ids kept per position
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import Buckets, p_log_ratio
from student_trainer.losses.kernel.labelled import LabelledBuckets
from student_trainer.losses.terms.divergences import Divergence
from student_trainer.losses.terms.term import ChunkView, Needs, TermValues

# Below this 1 - p_g is no direction to learn from, only rounding: the token's DKD is dropped.
SMALLEST_UNCERTAINTY = 1e-5


@dataclass(frozen=True, slots=True)
class TokenAdaptive:
    """ATKD as a term. A step's weigher says which tokens are hard and what each class counts.

    Its values include what their class counts. It reports which tokens are hard, 0 or 1, and UNC,
    TKD and DKD.
    """

    reported: ClassVar[tuple[str, ...]] = ("hard_share", "uncertainty", "tkd", "dkd")

    section: Any  # of the config: weight, direction

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """The label on its own, and the split of the step's tokens."""
        return Needs(label_apart=True, columns=("hard_N", "class_weight_N"))

    @property
    def is_kl_at(self) -> None:
        """None."""
        return None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """TKD + DKD of hard tokens and DKD of easy ones, times what their class counts."""
        assert chunk.labelled is not None, "the label is needed on its own"
        teacher, student = chunk.labelled
        reverse = self.section.direction == "reverse"
        parts = decoupled(student, teacher) if reverse else decoupled(teacher, student)
        hard_n = chunk.columns["hard_N"]
        values_n = chunk.columns["class_weight_N"] * parts.loss(hard_n)
        reports = (hard_n.to(parts.tkd_N.dtype), parts.uncertainty_N, parts.tkd_N, parts.dkd_N)
        return TermValues(values_n, dict(zip(self.reported, reports, strict=True)))


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


def _without_label(buckets: LabelledBuckets) -> Buckets:
    """The distribution given that it is not the label: divided by its own sum, which is 1 - p_g
    up to the rounding of what was shipped."""
    all_N = torch.cat([buckets.others_NK, buckets.tail_N[:, None]], dim=1).logsumexp(-1)
    all_N = torch.where(all_N == -torch.inf, 0, all_N)
    return Buckets(buckets.others_NK - all_N[:, None], buckets.tail_N - all_N)

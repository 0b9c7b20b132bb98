"""Divergences of two bucketed distributions, and the laws that each obeys.

Every divergence is a function of teacher and student `Buckets`, one value per position, in nats
per token, without any reduction. All look at the teacher's ids: how much of the student lies
outside them is the metric `unseen_mass`. With p the teacher, q the student and KL(a || b) =
sum a log(a / b), sums are over the kept ids and the tail.

`DIVERGENCES` is what a config can name: for each the function, the fields of its config section
that it takes, its laws as data, its formula and where it comes from.

N positions   K ids kept per position
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from student_trainer.losses.kernel.buckets import (
    Buckets,
    DrawnBuckets,
    mixture,
    p_log,
    p_log_ratio,
    sum_p_log_ratio,
)
from student_trainer.losses.terms.term import ChunkView, Needs, TermValues


def kl(first: Buckets, second: Buckets) -> Tensor:
    """KL(first || second) on K+1 outcomes, nats [N]; gradients flow to both."""
    kept_N = sum_p_log_ratio(first.kept_NK, second.kept_NK)
    return kept_N + p_log_ratio(first.tail_N, second.tail_N)


def forward_kl(teacher: Buckets, student: Buckets) -> Tensor:
    """KL(teacher || student), nats [N]: the mean-seeking direction.

    With q the student's softmax and p the teacher, the gradient with respect to the student's
    logits is q_j - p_j on kept ids and q_j (1 - p_tail / q_tail) elsewhere: zero at p = q.
    """
    return kl(teacher, student)


def reverse_kl(teacher: Buckets, student: Buckets) -> Tensor:
    """KL(student || teacher), nats [N]: the mode-seeking direction, MiniLLM's.

    Student mass in the tail is held against the teacher's tail as a whole, so that it cannot hide
    outside the kept ids, but where in the tail it lies makes no difference.
    """
    return kl(student, teacher.without_zeros())


def soft_cross_entropy(teacher: Buckets, student: Buckets) -> Tensor:
    """-sum p log q, nats [N]: forward KL plus the teacher's bucketed entropy, with its gradient."""
    kept_NK = p_log(teacher.kept_NK, student.kept_NK)
    return -(kept_NK.sum(-1) + p_log(teacher.tail_N, student.tail_N))


def drawn_forward_kl(teacher: DrawnBuckets, student: Buckets) -> Tensor:
    """-sum t log q - H, nats [N], with the weights t of drawn ids and the teacher's entropy H:
    unbiased in value and gradient. Of one draw it may lie below 0."""
    return soft_cross_entropy(teacher, student) - teacher.entropy_N


def jsd(teacher: Buckets, student: Buckets, *, beta: float, continuous: bool) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, nats [N].

    At beta 0 and 1 it is the forward and the reverse KL, as GKD has it. Between, it tends to 0
    towards both; `continuous` divides it by beta (1 - beta), whose limits are those two.
    """
    if beta == 0:
        return forward_kl(teacher, student)
    if beta == 1:
        return reverse_kl(teacher, student)
    middle = mixture(teacher, student, share=beta)
    value_N = beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)
    return value_N / (beta * (1 - beta)) if continuous else value_N


def skew_forward_kl(teacher: Buckets, student: Buckets, *, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), nats [N]: finite wherever the student is."""
    return kl(teacher, mixture(teacher, student, share=alpha))


def skew_reverse_kl(teacher: Buckets, student: Buckets, *, alpha: float) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p), nats [N]: finite wherever the teacher is."""
    return kl(student, mixture(student, teacher.without_zeros(), share=alpha))


def total_variation(teacher: Buckets, student: Buckets) -> Tensor:
    """Half the sum of |p - q| [N]: the largest difference any set of outcomes can show."""
    kept_NK = (teacher.kept_NK.exp() - student.kept_NK.exp()).abs()
    return (kept_NK.sum(-1) + (teacher.tail_N.exp() - student.tail_N.exp()).abs()) / 2


def akl(teacher: Buckets, student: Buckets, *, mu: float) -> Tensor:
    """g KL(p || q) + (1 - g) KL(q || p), nats [N]; g is the head's share of the gap sum |p - q|.

    The head are the likeliest kept ids up to a teacher mass of `mu`, at least one of them; the
    tail bucket is never in it, unless mu is 1. g carries no gradient.
    """
    if mu == 1:
        return forward_kl(teacher, student)
    head_N = _head_share(teacher, student.detach(), mu=mu)
    return head_N * forward_kl(teacher, student) + (1 - head_N) * reverse_kl(teacher, student)


def alpha_beta(teacher: Buckets, student: Buckets, *, alpha: float, beta: float) -> Tensor:
    """-sum(p^a q^b - a / (a + b) p^(a+b) - b / (a + b) q^(a+b)) / (a b) [N], with a and b alpha and
    beta. It is no f-divergence: merging the ids outside the kept ones may raise it or lower it."""
    both = alpha + beta

    def summed(p: Tensor, q: Tensor) -> Tensor:
        own = (alpha * (both * p).exp() + beta * (both * q).exp()) / both
        return own - (alpha * p + beta * q).exp()

    kept_N = summed(teacher.kept_NK, student.kept_NK).sum(-1)
    return (kept_N + summed(teacher.tail_N, student.tail_N)) / (alpha * beta)


def generalised_kl(teacher: Buckets, student: Buckets, *, direction: str) -> Tensor:
    """sum p log(p / q) - p + q over the kept ids alone, nats [N]; in reverse p and q swapped.

    It does not see the tail; the two masses keep student mass from leaving the kept ids.
    """
    first_NK, second_NK = teacher.kept_NK, student.kept_NK
    if direction == "reverse":
        first_NK, second_NK = second_NK, teacher.without_zeros().kept_NK
    return (p_log_ratio(first_NK, second_NK) - first_NK.exp() + second_NK.exp()).sum(-1)


def taid(teacher: Buckets, student: Buckets, *, teacher_share: float) -> Tensor:
    """Cross-entropy with the target t p + (1 - t) q, in which q carries no gradient, nats [N].

    t is `teacher_share`, which `student_trainer.weighing.taid` moves. The published code mixes
    logits, a geometric mixture that needs the teacher's whole vocabulary; this mixes
    probabilities, which is exact on buckets. As there, the value is a cross-entropy, for the sake
    of the controller that follows it; its gradient is that of KL(target || q).
    """
    return soft_cross_entropy(mixture(teacher, student.detach(), share=teacher_share), student)


def _head_share(teacher: Buckets, student: Buckets, *, mu: float) -> Tensor:
    """The head's share of the gap between the distributions [N]; 0 where there is no gap."""
    p_NK, order_NK = teacher.kept_NK.exp().sort(dim=-1, descending=True, stable=True)
    gap_NK = (p_NK - student.kept_NK.exp().gather(-1, order_NK)).abs()
    outside_NK = p_NK.cumsum(-1) > mu
    outside_NK[:, 0] = False
    tail_N = (teacher.tail_N.exp() - student.tail_N.exp()).abs()
    total_N = (gap_NK.sum(-1) + tail_N).clamp(min=torch.finfo(gap_NK.dtype).tiny)
    return gap_NK.masked_fill(outside_NK, 0).sum(-1) / total_N


@dataclass(frozen=True, slots=True)
class Bound:
    """What a divergence never exceeds, as a text and as a function of its parameters."""

    text: str
    of: Callable[..., float]


@dataclass(frozen=True, slots=True)
class Laws:
    """What holds for every teacher, student, vocabulary, k and temperature, up to rounding."""

    lower_bound: bool = True  # never above its value over the full vocabulary
    monotone: bool = True  # never falls when an id leaves the tail for the kept ones
    zero_value: bool = True  # 0 where student and teacher are equal
    zero_gradient: bool = True  # as is its gradient there
    symmetric_at: Mapping[str, float] | None = None  # parameters at which p and q may be swapped
    bound: Bound | None = None


@dataclass(frozen=True, slots=True)
class Divergence:
    """One entry of the registry."""

    function: Callable[..., Tensor]
    formula: str
    source: str
    parameters: tuple[str, ...] = ()  # keyword arguments of the function
    laws: Laws = field(default_factory=Laws)
    # Its estimate from drawn ids; None: it needs both distributions at the same ids.
    drawn: Callable[[DrawnBuckets, Buckets], Tensor] | None = None
    moving: tuple[str, ...] = ()  # parameters that the step sets, not the config

    def of(self, teacher: Buckets, student: Buckets, **parameters: Any) -> Tensor:
        """Its values [N], estimated where the teacher's ids are drawn."""
        if not isinstance(teacher, DrawnBuckets):
            return self.function(teacher, student, **parameters)
        assert self.drawn is not None, f"{self.formula} needs both distributions at the same ids"
        return self.drawn(teacher, student)


def _jsd_bound(beta: float, continuous: bool) -> float:
    """The entropy of a draw that is the teacher's with probability beta."""
    if beta in (0, 1):
        return math.inf
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    return entropy / (beta * (1 - beta)) if continuous else entropy


def _skew_bound(alpha: float) -> float:
    return -math.log(alpha) if alpha else math.inf


def _alpha_beta_bound(alpha: float, beta: float) -> float:
    return 1 / (alpha * beta) if alpha + beta >= 1 else math.inf


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        forward_kl,
        "KL(p, q)",
        "Hinton et al. 2015; tail bucket: arXiv 2503.16870",
        drawn=drawn_forward_kl,
    ),
    "reverse_kl": Divergence(reverse_kl, "KL(q, p)", "MiniLLM, arXiv 2306.08543"),
    "soft_cross_entropy": Divergence(
        soft_cross_entropy,
        "-sum p log q",
        "AKD, Saxena, Janzen and Maass, WiML 2024",
        laws=Laws(zero_value=False),
        drawn=soft_cross_entropy,
    ),
    "jsd": Divergence(
        jsd,
        "beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; "
        "continuous: over beta (1 - beta)",
        "GKD, arXiv 2306.13649",
        ("beta", "continuous"),
        Laws(
            symmetric_at={"beta": 0.5},
            bound=Bound(
                "entropy of (beta, 1 - beta); continuous: over beta (1 - beta)", _jsd_bound
            ),
        ),
    ),
    "skew_forward_kl": Divergence(
        skew_forward_kl,
        "KL(p, alpha p + (1 - alpha) q)",
        "DistiLLM, arXiv 2402.03898",
        ("alpha",),
        Laws(bound=Bound("-log alpha", _skew_bound)),
    ),
    "skew_reverse_kl": Divergence(
        skew_reverse_kl,
        "KL(q, alpha q + (1 - alpha) p)",
        "DistiLLM, arXiv 2402.03898",
        ("alpha",),
        Laws(bound=Bound("-log alpha", _skew_bound)),
    ),
    "total_variation": Divergence(
        total_variation,
        "sum abs(p - q) / 2",
        "f-distill, arXiv 2307.15190",
        laws=Laws(zero_gradient=False, symmetric_at={}, bound=Bound("1", lambda: 1.0)),
    ),
    "akl": Divergence(
        akl,
        "g KL(p, q) + (1 - g) KL(q, p), g: the head's share of sum abs(p - q)",
        "AKL, arXiv 2404.02657",
        ("mu",),
        Laws(lower_bound=False, monotone=False),
    ),
    "alpha_beta": Divergence(
        alpha_beta,
        "sum (a p^(a+b) + b q^(a+b)) / (a b (a + b)) - p^a q^b / (a b), a and b: alpha and beta",
        "ABKD, arXiv 2505.04560",
        ("alpha", "beta"),
        Laws(
            lower_bound=False,
            monotone=False,
            symmetric_at={"alpha": 1.0, "beta": 1.0},
            bound=Bound("1 / (alpha beta), where they sum to 1 or more", _alpha_beta_bound),
        ),
    ),
    "generalised_kl": Divergence(
        generalised_kl,
        "sum p log(p / q) - p + q over the kept ids; reverse: p and q swapped",
        "Csiszar 1991, I-divergence",
        ("direction",),
    ),
    "taid": Divergence(
        taid,
        "-sum r log q, r = t p + (1 - t) q without a gradient",
        "TAID, arXiv 2501.16937, its logit mixture replaced",
        ("teacher_share",),
        Laws(zero_value=False),
        moving=("teacher_share",),
    ),
}


@dataclass(frozen=True, slots=True)
class DivergenceTerm:
    """A divergence of the registry as a term, at one temperature."""

    reported: ClassVar[tuple[str, ...]] = ()

    section: Any  # of the config: weight, temperature, times_temperature_squared, parameters

    @property
    def divergence(self) -> Divergence:
        """Its entry of the registry."""
        return DIVERGENCES[self.section.kind]

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """Both distributions at its temperature."""
        return Needs(temperatures=(self.section.temperature,))

    @property
    def is_kl_at(self) -> float | None:
        """1 where it is the forward KL there."""
        is_kl = self.divergence.function is forward_kl and self.section.temperature == 1
        return 1.0 if is_kl else None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """Its values, times the square of the temperature if the section says so."""
        divergence, section = self.divergence, self.section
        parameters = {
            name: chunk.moving[name] if name in divergence.moving else getattr(section, name)
            for name in divergence.parameters
        }
        of = partial(divergence.of, **parameters)
        scale = section.temperature**2 if section.times_temperature_squared else 1.0
        return TermValues(chunk.compared(of, section.temperature, scale=scale))

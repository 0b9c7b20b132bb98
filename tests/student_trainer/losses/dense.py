"""Dense references over the whole vocabulary, in the precision of what they are given.

N positions   D hidden width   V vocabulary   K ids kept per position
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import TokenLosses, token_losses


def forward_kl_term(
    *, weight: float = 1.0, temperature: float = 1.0, squared: bool = True
) -> SimpleNamespace:
    """A term with the fields of the config's section."""
    return SimpleNamespace(
        kind="forward_kl",
        weight=weight,
        temperature=temperature,
        times_temperature_squared=squared,
    )


def cross_entropy_term(*, weight: float = 1.0) -> SimpleNamespace:
    """A term with the fields of the config's section."""
    return SimpleNamespace(kind="cross_entropy", weight=weight)


def tail_of(log_probs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-mass outside `ids` [N], by a masked logsumexp."""
    return log_probs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)


def targets_from(
    logits_NV: Tensor, k: int, *, temperatures: tuple[float, ...] = (1.0,)
) -> TeacherTargets:
    """What an exact teacher with these logits ships for its top k."""
    logprobs_NK, ids_NK = logits_NV.log_softmax(-1).topk(k)
    tails = [tail_of((logits_NV / t).log_softmax(-1), ids_NK) for t in temperatures]
    return TeacherTargets(ids_NK, logprobs_NK, torch.stack(tails, -1), temperatures)


def bucketed_kl(
    teacher_NV: Tensor, student_NV: Tensor, ids_NK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL over the kept ids and the tail [N] from both models' full logits."""
    log_p_NV, log_q_NV = ((z / temperature).log_softmax(-1) for z in (teacher_NV, student_NV))
    log_p_NK, log_q_NK = log_p_NV.gather(1, ids_NK), log_q_NV.gather(1, ids_NK)
    kept_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    if ids_NK.shape[1] == teacher_NV.shape[1]:
        return kept_N
    log_p_N, log_q_N = tail_of(log_p_NV, ids_NK), tail_of(log_q_NV, ids_NK)
    return kept_N + log_p_N.exp() * (log_p_N - log_q_N)


def full_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL over the whole vocabulary [N]."""
    log_p_NV, log_q_NV = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


@dataclass(frozen=True)
class Case:
    """Random student states and head, a random teacher, and labels."""

    hidden_ND: Tensor
    head: Head
    teacher_NV: Tensor
    label_N: Tensor

    @staticmethod
    def random(
        rows: int = 37,
        *,
        width: int = 16,
        vocabulary: int = 101,
        kind: torch.dtype = torch.float64,
        scale: float = 2.0,
        seed: int = 0,
        bias: bool = False,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
    ) -> "Case":
        """Logits of a standard deviation near `scale`, before cap and logit scale."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight_VD = scale * normal(vocabulary, width) / width**0.5
        bias_V = normal(vocabulary) if bias else None
        return Case(
            normal(rows, width).to(kind).requires_grad_(),
            Head(
                weight_VD.to(kind).requires_grad_(),
                None if bias_V is None else bias_V.to(kind).requires_grad_(),
                logit_scale,
                soft_cap,
            ),
            scale * normal(rows, vocabulary),
            torch.randint(0, vocabulary, (rows,), generator=generator),
        )

    def in_float64(self) -> "Case":
        """The same numbers, exactly, as fresh float64 leaves."""
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in self.leaves]
        assert leaves[0] is not None
        assert leaves[1] is not None
        head = replace(self.head, weight_VD=leaves[1], bias_V=leaves[2])
        return Case(leaves[0], head, self.teacher_NV, self.label_N)

    @property
    def leaves(self) -> list[Tensor | None]:
        """What gradients flow to: states, weight, bias."""
        return [self.hidden_ND, self.head.weight_VD, self.head.bias_V]

    def targets(self, k: int, *, temperatures: tuple[float, ...] = (1.0,)) -> TeacherTargets:
        """The teacher's, in the precision the student computes in."""
        exact = targets_from(self.teacher_NV, k, temperatures=temperatures)
        kind = torch.promote_types(self.hidden_ND.dtype, torch.float32)
        return replace(
            exact, logprobs_NK=exact.logprobs_NK.to(kind), log_tail_NS=exact.log_tail_NS.to(kind)
        )

    def losses(self, *, terms: list, teacher_share: float = 1.0, **options) -> TokenLosses:
        """`token_losses` on the case's states, head and labels; `terms` are sections."""
        return token_losses(
            self.hidden_ND,
            self.head,
            label_N=self.label_N,
            terms=terms_of(terms),
            moving={"teacher_share": teacher_share},
            **options,
        )


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    """Gradients of a scalar with respect to the leaves that require one."""
    leaves = [x for x in case.leaves if x is not None and x.requires_grad]
    return list(torch.autograd.grad(loss, leaves))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


MIXES = [
    [forward_kl_term()],
    [cross_entropy_term()],
    [forward_kl_term(temperature=2.0)],
    [forward_kl_term(weight=0.7, temperature=2.0), cross_entropy_term(weight=0.3)],
    [
        forward_kl_term(weight=0.2),
        forward_kl_term(weight=0.5, temperature=4.0, squared=False),
        forward_kl_term(weight=0.1, temperature=0.5),
        cross_entropy_term(weight=0.3),
    ],
]
ALL_TEMPERATURES = (1.0, 0.5, 2.0, 4.0)


def dense_loss(case: Case, terms: list, k: int) -> torch.Tensor:
    """Weighted sum of the terms over all positions from full logits."""
    student_NV = case.head.logits(case.hidden_ND)
    ids_NK = case.teacher_NV.topk(k).indices
    total = torch.zeros((), dtype=student_NV.dtype)
    for term in terms:
        if term.kind == "cross_entropy":
            value = nn.functional.cross_entropy(student_NV, case.label_N, reduction="sum")
        else:
            value = bucketed_kl(
                case.teacher_NV, student_NV, ids_NK, temperature=term.temperature
            ).sum()
            if term.times_temperature_squared:
                value = value * term.temperature**2
        total = total + term.weight * value
    return total

"""The student's likeliest ids, and what the losses that weigh by the student gain from them.

N positions   V vocabulary   M ids that the student names   K ids kept per position
"""

from types import SimpleNamespace

import pytest
import torch

from student_trainer.losses.kernel.likeliest import likeliest_ids
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import TeacherTargets
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import TokenLosses, token_losses
from teacher_service.scoring.scoring import ScoringHead, select
from tests.allocations import largest_tensor

N, V, D = 60, 211, 16
HEADS = [
    {},
    {"bias_V": torch.linspace(-1, 1, V)},
    {"bias_V": torch.linspace(-1, 1, V), "logit_scale": 0.4, "soft_cap": 3.0},
]


def problem(**head) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """The student's states and head, and those of a teacher of its width."""
    generator = torch.Generator().manual_seed(7)
    student_ND, teacher_ND = torch.randn(2, N, D, generator=generator)
    return student_ND, Head(torch.randn(V, D, generator=generator), **head), teacher_ND


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shared_vocab", [V, 150])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_they_are_the_likeliest_of_dense_logits(head, shared_vocab, kind) -> None:
    hidden_ND, head, _ = problem(**head)
    hidden_ND, narrow = hidden_ND.to(kind), Head(head.weight_VD.to(kind), *_rest(head))
    found_NM = likeliest_ids(hidden_ND, narrow, count=9, shared_vocab=shared_vocab, chunk_rows=16)
    logits_NV = narrow.logits(hidden_ND).double()[:, :shared_vocab]
    torch.testing.assert_close(
        logits_NV.gather(1, found_NM), logits_NV.topk(9).values, atol=1e-5, rtol=0
    )
    assert (found_NM.sort(1).values.diff(dim=1) > 0).all()


def _rest(head: Head) -> tuple:
    return head.bias_V, head.logit_scale, head.soft_cap


def test_no_tensor_of_positions_times_vocabulary_is_allocated() -> None:
    hidden_ND, head = torch.randn(512, D), Head(torch.randn(4000, D))
    largest = largest_tensor(
        lambda: likeliest_ids(hidden_ND, head, count=4, shared_vocab=3000, chunk_rows=32)
    )
    assert largest == 32 * 4000


def test_no_position_has_no_ids() -> None:
    _, head, _ = problem()
    assert likeliest_ids(torch.zeros(0, D), head, count=4, shared_vocab=V).shape == (0, 4)


TERMS = {
    "reverse_kl": {},
    "jsd": {"beta": 0.4, "continuous": False},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
}


def losses_of(kind: str, *, top_k: int, named: int, temperature: float = 1.0) -> TokenLosses:
    """A divergence of a teacher that answers about its own ids and the student's."""
    hidden_ND, head, teacher_ND = problem()
    # Peaked elsewhere than the student, so that its own ids are not the teacher's.
    teacher = ScoringHead(head.weight_VD.flip(0) * 1.5)
    label_N = torch.zeros(N, dtype=torch.int64)
    ids_NM = likeliest_ids(hidden_ND, head, count=named, shared_vocab=V) if named else None
    found = select(
        teacher_ND,
        teacher,
        label_N,
        num_ids=top_k + named,
        shared_vocab=V,
        named_NM=ids_NM,
        temperatures=(1.0, temperature),
    )
    term = SimpleNamespace(
        kind=kind,
        weight=1.0,
        temperature=temperature,
        times_temperature_squared=False,
        **TERMS[kind],
    )
    targets = TeacherTargets(found.ids_NK, found.logprobs_NK, found.log_tail_NS, (1.0, temperature))
    return token_losses(hidden_ND, head, label_N=label_N, terms=terms_of([term]), targets=targets)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_named_ids_bring_a_divergence_nearer_to_the_dense_one_which_all_ids_give(
    kind: str, temperature: float
) -> None:
    without, with_own, all_ids = (
        losses_of(kind, top_k=top_k, named=named, temperature=temperature)
        for top_k, named in ((8, 0), (8, 8), (V - 8, 8))
    )
    values = [found.terms[kind] for found in (without, with_own, all_ids)]
    assert (values[0] <= values[1] + 1e-5).all()
    assert (values[1] <= values[2] + 1e-5).all()
    assert (values[2] - values[1]).mean() < 0.95 * (values[2] - values[0]).mean()
    hidden_ND, head, teacher_ND = problem()
    q_NV = (head.logits(hidden_ND).double() / temperature).log_softmax(-1)
    teacher_NV = 1.5 * teacher_ND.double() @ head.weight_VD.flip(0).double().T
    expected_N = dense(kind, (teacher_NV / temperature).log_softmax(-1), q_NV)
    torch.testing.assert_close(values[2].double(), expected_N, atol=1e-4, rtol=1e-4)


def dense(kind: str, p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    """The divergences as the registry writes them, over the whole vocabulary."""

    def kl(x_NV: torch.Tensor, y_NV: torch.Tensor) -> torch.Tensor:
        return (x_NV.exp() * (x_NV - y_NV)).sum(-1)

    if kind == "reverse_kl":
        return kl(q_NV, p_NV)
    if kind == "jsd":
        m_NV = (0.4 * p_NV.exp() + 0.6 * q_NV.exp()).log()
        return 0.4 * kl(p_NV, m_NV) + 0.6 * kl(q_NV, m_NV)
    if kind == "skew_reverse_kl":
        return kl(q_NV, (0.1 * q_NV.exp() + 0.9 * p_NV.exp()).log())
    assert kind == "total_variation"
    return (p_NV.exp() - q_NV.exp()).abs().sum(-1) / 2


def test_less_of_the_student_is_unseen() -> None:
    without, same_size, with_own = (
        losses_of("reverse_kl", top_k=top_k, named=named).unseen_mass_N
        for top_k, named in ((8, 0), (16, 0), (8, 8))
    )
    assert without is not None
    assert same_size is not None
    assert with_own is not None
    assert (with_own < without).all()
    assert with_own.mean() < 0.5 * same_size.mean()

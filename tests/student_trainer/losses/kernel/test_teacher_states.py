"""The full vocabulary from the teacher's last states and head: against dense float64.

N positions   D student width   E teacher width   V student rows   W teacher rows   K shared ids
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from student_trainer.losses.kernel import fused
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from tests.allocations import largest_tensor, peak_bytes
from tests.student_trainer.losses.dense import Case, gradients, relative_error
from tests.student_trainer.losses.terms.test_token_adaptive import atkd_term, classes_of, shipped
from tests.student_trainer.losses.textbook import CASES, teacher_share, term, textbook

F64 = torch.float64
HEADS = {  # the teacher's type, and options of both heads
    "plain": (torch.float32, {}),
    "bias": (torch.float16, {"bias": True}),
    "soft cap": (torch.float32, {"soft_cap": 3.0}),
    "logit scale": (torch.bfloat16, {"logit_scale": 0.3}),
    "all": (torch.bfloat16, {"bias": True, "logit_scale": 1.7, "soft_cap": 5.0}),
}
every_case = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Exact:
    """A student beside the teacher's states, and the same with the teacher's dense logits."""

    case: Case
    states: TeacherStates

    @staticmethod
    def random(
        *,
        student: torch.dtype = torch.float32,
        teacher: torch.dtype = torch.float32,
        rows: tuple[int, int] = (101, 101),
        shared: int = 101,
        **options,
    ) -> "Exact":
        """`rows` of the student's and of the teacher's head, `options` of both."""
        case = Case.random(23, width=16, vocabulary=rows[0], kind=student, **options)
        other = Case.random(23, width=24, vocabulary=rows[1], kind=teacher, seed=1, **options)
        bias_V = other.head.bias_V
        head = replace(
            other.head,
            weight_VD=other.head.weight_VD.detach(),
            bias_V=None if bias_V is None else bias_V.detach(),
        )
        states = TeacherStates(other.hidden_ND.detach(), TeacherHead(head, shared))
        label_N = torch.arange(23) * 4 % shared
        dense_NW = states_in_float64(states)
        return Exact(replace(case, teacher_NV=dense_NW, label_N=label_N), states)

    def found(self, name: str, **options) -> tuple[Tensor, Tensor]:
        """Loss and values of a divergence alone, in chunks."""
        losses = self.case.losses(
            terms=[term(name, **options)],
            targets=self.states,
            teacher_share=teacher_share(name),
            chunk_rows=10,
        )
        (value_N,) = losses.terms.values()
        return losses.loss, value_N

    def expected(self, name: str, *, temperature: float = 1.0) -> tuple[Case, Tensor]:
        """The same case in float64 and its values there, over the shared ids and one tail."""
        case, shared = self.case.in_float64(), self.states.num_ids
        whole = case.head.vocabulary <= shared
        student_NV = case.head.logits(case.hidden_ND)
        teacher_NV = case.teacher_NV[:, :shared] if whole else case.teacher_NV
        pair = [grouped(x / temperature, shared) for x in (teacher_NV, student_NV)]
        return case, textbook(name, *pair, tail=not whole)


def states_in_float64(states: TeacherStates) -> Tensor:
    """Logits [N,W] of the very numbers that were shipped."""
    head = states.teacher.head
    bias_V = None if head.bias_V is None else head.bias_V.double()
    wide = Head(head.weight_VD.double(), bias_V, head.logit_scale, head.soft_cap)
    return wide.logits(states.hidden_NE.double())


def grouped(logits_NV: Tensor, shared: int) -> Tensor:
    """Probabilities of the shared ids and, where there is anything else, of that."""
    p_NV = logits_NV.softmax(-1)
    if p_NV.shape[1] == shared:
        return p_NV
    return torch.cat([p_NV[:, :shared], p_NV[:, shared:].sum(-1, keepdim=True)], dim=1)


@every_case
@pytest.mark.parametrize(("teacher", "options"), HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_within_1e_5_of_dense(name, options, teacher):
    exact = Exact.random(teacher=teacher, **options)
    loss, value_N = exact.found(name)
    case, value_in_float64_N = exact.expected(name)
    torch.testing.assert_close(value_N.double(), value_in_float64_N, atol=1e-5, rtol=1e-5)
    if name != "taid 0":  # no gradient but rounding
        pairs = zip(
            gradients(loss, exact.case), gradients(value_in_float64_N.sum(), case), strict=True
        )
        assert max(relative_error(*pair) for pair in pairs) < 1e-5


@every_case
@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_every_temperature_and_its_square_are_exact(name, temperature):
    exact = Exact.random(student=F64, teacher=F64)
    _, value_N = exact.found(name, temperature=temperature)
    _, expected_N = exact.expected(name, temperature=temperature)
    torch.testing.assert_close(value_N, expected_N * temperature**2, atol=1e-11, rtol=1e-10)


@every_case
@pytest.mark.parametrize("rows", [(101, 128), (120, 128)], ids=str)
def test_padding_rows_are_the_tail_or_left_out_where_the_student_has_none(name, rows):
    """A teacher without padding beside a student with some is tested with the shipped ids."""
    exact = Exact.random(student=F64, teacher=F64, rows=rows)
    loss, value_N = exact.found(name)
    case, expected_N = exact.expected(name)
    torch.testing.assert_close(value_N, expected_N, atol=1e-11, rtol=1e-10)
    pairs = zip(gradients(loss, exact.case), gradients(expected_N.sum(), case), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_atkd_and_what_is_reported_are_those_of_a_whole_shipped_vocabulary(direction):
    exact = Exact.random(student=F64, teacher=F64, bias=True)
    options = {"terms": [atkd_term(direction)], "columns": classes_of(exact.case)}
    one = exact.case.losses(targets=exact.states, **options)
    other = exact.case.losses(targets=shipped(exact.case, 101), **options)
    for found, expected in (
        (one.loss, other.loss),
        (one.kl_N, other.kl_N),
        (one.label_nll_N, other.label_nll_N),
        (one.unseen_mass_N, other.unseen_mass_N),
        *((one.reports[name], other.reports[name]) for name in one.reports),
        *zip(gradients(one.loss, exact.case), gradients(other.loss, exact.case), strict=True),
    ):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    assert (one.captured_mass_N == 1).all()


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    case = Case.random(23, kind=torch.float32)
    head = replace(case.head, weight_VD=case.head.weight_VD.detach())
    states = TeacherStates(case.hidden_ND.detach(), TeacherHead(head, 101))
    exact = Exact(case, states)
    for name in ("forward_kl", "reverse_kl", "jsd .5", "skew_forward_kl .1"):
        loss, value_N = exact.found(name)
        assert value_N.abs().max() < 1e-6
        assert max(x.abs().max() for x in gradients(loss, case)) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_parts_of_a_chunk_change_nothing_but_rounding(monkeypatch, temperature):
    """Temperature 2 leaves the gradient in another buffer than that of the reported KL."""
    exact = Exact.random()
    options = {"terms": [term("jsd .5", temperature=temperature)], "targets": exact.states}
    chunk = gradients(exact.case.losses(**options, chunk_rows=20).loss, exact.case)
    monkeypatch.setattr(fused, "PART_BYTES", 3 * 4 * exact.case.head.vocabulary)
    parts = gradients(exact.case.losses(**options, chunk_rows=20).loss, exact.case)
    for pair in zip(parts, chunk, strict=True):
        torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-5)


def test_a_tied_head_collects_the_gradients_of_both_uses():
    exact, inputs_N = Exact.random(student=F64, teacher=F64), torch.arange(23)
    weight_VD = exact.case.head.weight_VD

    def tied(case: Case) -> Case:
        return replace(case, hidden_ND=torch.tanh(case.head.weight_VD[inputs_N]))

    loss, _ = replace(exact, case=tied(exact.case)).found("reverse_kl")
    student_NV = exact.case.head.logits(tied(exact.case).hidden_ND)
    dense = textbook(
        "reverse_kl", exact.case.teacher_NV.softmax(-1), student_NV.softmax(-1), tail=False
    )
    (one,), (other,) = (torch.autograd.grad(x, weight_VD) for x in (loss, dense.sum()))
    torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_no_positions_have_no_loss_and_zero_gradients():
    exact = Exact.random()
    none = replace(exact.case, hidden_ND=exact.case.hidden_ND[:0].detach().requires_grad_())
    none = replace(none, label_N=none.label_N[:0])
    empty = replace(exact.states, hidden_NE=exact.states.hidden_NE[:0])
    loss, _ = Exact(none, empty).found("forward_kl")
    assert loss.item() == 0
    assert all((x == 0).all() for x in gradients(loss, none))


def test_nothing_of_positions_by_vocabulary_outlives_a_chunk():
    """Of 400 positions, ten to a chunk; the head's gradient is the one large thing that stays."""
    case = Case.random(400, width=8, vocabulary=1000, kind=torch.float32)
    head = replace(case.head, weight_VD=case.head.weight_VD.detach().clone())
    states = TeacherStates(case.hidden_ND.detach(), TeacherHead(head, 1000))

    def call() -> None:
        found = case.losses(
            terms=[term("jsd .5"), term("reverse_kl", temperature=2.0)],
            targets=states,
            chunk_rows=10,
        )
        found.loss.backward()

    assert largest_tensor(call) <= 11 * 1001
    chunk_bytes, all_bytes = 4 * 10 * 1000, 4 * 400 * 1000
    assert peak_bytes(call) < min(60 * chunk_bytes, 2 * all_bytes)

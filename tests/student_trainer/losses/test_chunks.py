"""Heads, chunks and their parts: what gets gradients, what only rounds otherwise, what is held."""

from dataclasses import replace

import pytest
import torch

from student_trainer.losses.kernel import fused
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.registry import loss_names
from tests.allocations import largest_tensor, peak_bytes
from tests.student_trainer.losses.dense import (
    ALL_TEMPERATURES,
    MIXES,
    Case,
    bucketed_kl,
    cross_entropy_term,
    dense_loss,
    forward_kl_term,
    gradients,
    relative_error,
)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    case = Case.random(64, vocabulary=600, width=32, kind=torch.float32)
    targets, terms = case.targets(8), [forward_kl_term()]
    trained = gradients(case.losses(terms=terms, targets=targets).loss, case)[0]
    frozen = replace(case, head=Head(case.head.weight_VD.detach()))
    found = gradients(frozen.losses(terms=terms, targets=targets).loss, frozen)
    assert len(found) == 1
    assert torch.equal(found[0], trained)
    options = {"terms": terms, "targets": targets, "chunk_rows": 16}
    saved = peak_bytes(lambda: case.losses(**options)) - peak_bytes(
        lambda: frozen.losses(**options)
    )
    assert saved >= 4 * 600 * 32


def test_a_tied_head_collects_the_gradients_of_both_uses():
    case = Case.random(kind=torch.float32)
    weight_VD, inputs_N = case.head.weight_VD, torch.arange(37)
    targets, terms = case.targets(8), [forward_kl_term()]

    def tied(weight: torch.Tensor) -> torch.Tensor:
        hidden_ND = torch.tanh(weight[inputs_N])
        return (
            replace(case, hidden_ND=hidden_ND, head=Head(weight))
            .losses(terms=terms, targets=targets)
            .loss
        )

    tied(weight_VD).backward()
    exact_VD = weight_VD.detach().double().requires_grad_()
    student_NV = torch.tanh(exact_VD[inputs_N]) @ exact_VD.t()
    bucketed_kl(case.teacher_NV, student_NV, targets.ids_NK).sum().backward()
    assert relative_error(weight_VD.grad, exact_VD.grad) < 1e-5


@pytest.mark.parametrize("hidden_kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_kind", [torch.bfloat16, torch.float32])
def test_narrow_states_and_heads_are_computed_wide(hidden_kind, weight_kind):
    case = Case.random(64, width=32, vocabulary=700, kind=torch.float32)
    case = replace(
        case,
        hidden_ND=case.hidden_ND.detach().to(hidden_kind).requires_grad_(),
        head=Head(case.head.weight_VD.detach().to(weight_kind).requires_grad_()),
    )
    exact, terms, targets = case.in_float64(), MIXES[3], case.targets(8, temperatures=(1.0, 2.0))
    found = case.losses(terms=terms, targets=targets, chunk_rows=10)
    expected = dense_loss(exact, terms, 8)
    assert found.loss.dtype == torch.float32
    assert relative_error(found.loss, expected) < 1e-6
    kinds = (hidden_kind, weight_kind)
    pairs = zip(gradients(found.loss, case), gradients(expected, exact), kinds, strict=True)
    for one, other, kind in pairs:
        assert one.dtype == kind
        assert relative_error(one, other) < (1e-5 if kind == torch.float32 else 2**-8)


def test_no_positions_give_a_zero_connected_to_everything():
    case = Case.random(0, bias=True)
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    found = case.losses(terms=MIXES[-1], targets=targets)
    assert found.loss.item() == 0
    assert all(value.shape == (0,) for value in found.terms.values())
    found.loss.backward()
    for leaf in case.leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    full = Case.random(bias=True)
    other = full.losses(terms=MIXES[-1], targets=full.targets(8, temperatures=ALL_TEMPERATURES))
    assert type(found.loss.grad_fn) is type(other.loss.grad_fn)


def test_an_incoming_gradient_scales_the_result():
    case, terms = Case.random(), [cross_entropy_term()]
    once = gradients(case.losses(terms=terms).loss, case)
    scaled = gradients(-2.5 * case.losses(terms=terms).loss, case)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, -2.5 * one, atol=1e-12, rtol=1e-12)


def test_a_second_backward_is_refused():
    case = Case.random()
    loss = case.losses(terms=[cross_entropy_term()]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="runs once"):
        loss.backward()


def test_the_chunk_size_changes_nothing_but_rounding():
    case, terms = Case.random(), MIXES[-1]
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    whole = gradients(case.losses(terms=terms, targets=targets, chunk_rows=37).loss, case)
    for chunk_rows in (1, 5, 36):
        parts = case.losses(terms=terms, targets=targets, chunk_rows=chunk_rows)
        pairs = zip(gradients(parts.loss, case), whole, strict=True)
        assert all(relative_error(one, other) < 1e-13 for one, other in pairs)


def test_parts_of_a_chunk_change_nothing_but_rounding(monkeypatch):
    case, terms = Case.random(soft_cap=5.0), MIXES[-1]
    options = {"targets": case.targets(8, temperatures=ALL_TEMPERATURES), "chunk_rows": 20}
    chunk = gradients(case.losses(terms=terms, **options).loss, case)
    monkeypatch.setattr(fused, "PART_BYTES", 3 * 4 * case.head.vocabulary)
    parts = gradients(case.losses(terms=terms, **options).loss, case)
    assert all(relative_error(*pair) < 1e-13 for pair in zip(parts, chunk, strict=True))


@pytest.mark.parametrize("terms", MIXES)
@pytest.mark.parametrize("chunk_rows", [1, 10, 37])
def test_weights_by_loss_equal_dense_float64_in_any_number_of_chunks(terms, chunk_rows):
    case = Case.random(bias=True, soft_cap=3.0)
    weight_N = torch.linspace(-1, 2, 37, dtype=torch.float64)
    targets = case.targets(8, temperatures=ALL_TEMPERATURES)
    options = {"terms": terms, "targets": targets, "multiplier": 1 / 37}
    weights = {n: weight_N + i for i, n in enumerate(loss_names(terms))}
    found = case.losses(weights=weights, chunk_rows=chunk_rows, **options)
    parts = []
    for place, weight in enumerate(weight_N):
        one = slice(place, place + 1)
        alone = replace(
            case,
            hidden_ND=case.hidden_ND[one],
            teacher_NV=case.teacher_NV[one],
            label_N=case.label_N[one],
        )
        parts += [(weight + i) / 37 * dense_loss(alone, [t], 8) for i, t in enumerate(terms)]
    expected = torch.stack(parts).sum()
    torch.testing.assert_close(found.loss, expected, atol=1e-12, rtol=1e-12)
    pairs = zip(gradients(found.loss, case), gradients(expected, case), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)
    for name, value_N in case.losses(**options).terms.items():
        torch.testing.assert_close(found.terms[name], value_N)  # unweighted


def test_equal_weights_give_the_bits_of_none():
    case, terms = Case.random(kind=torch.float32), MIXES[-1]
    options = {"terms": terms, "multiplier": 1 / 37, "chunk_rows": 7}
    options["targets"] = case.targets(8, temperatures=ALL_TEMPERATURES)
    equal = dict.fromkeys(loss_names(terms), torch.ones(37))
    one, other = (case.losses(weights=w, **options).loss for w in ({}, equal))
    assert torch.equal(one, other)
    pairs = zip(gradients(one, case), gradients(other, case), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_nothing_of_positions_times_vocabulary_is_allocated(soft_cap):
    case = Case.random(128, width=8, vocabulary=900, kind=torch.float32, soft_cap=soft_cap)
    targets = case.targets(8, temperatures=(1.0, 2.0))
    options = {"terms": MIXES[3], "targets": targets, "chunk_rows": 16}

    def call() -> None:
        case.losses(**options).loss.backward()

    assert largest_tensor(call) == 16 * 900

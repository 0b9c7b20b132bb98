"""Hidden-state matching: values, decoding, and the projection's gradient."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from student_trainer.losses.auxiliary.hidden_states import (
    HiddenStateMatching,
    decoded_states,
    projection,
)


@dataclass(frozen=True)
class Pairs:
    """Both models' states by layer, and the projections between them."""

    student_ND: dict[int, torch.Tensor]
    teacher_NE: dict[int, torch.Tensor]
    projections: torch.nn.ModuleDict

    def value(self, *, layers: dict[int, int], distance: str) -> torch.Tensor:
        """The loss [N], its states picked from an output of one line of five tokens."""
        section = SimpleNamespace(weight=1.0, layers=layers, distance=distance)
        matching = HiddenStateMatching(section, self.projections)
        output = SimpleNamespace(hidden_states={n: x[None] for n, x in self.student_ND.items()})
        teacher = {f"teacher_{layer}_NE": x for layer, x in self.teacher_NE.items()}
        return matching.values(matching.pick(output, {"loss_index_N": torch.arange(5)}) | teacher)


def pairs(teacher: dict[int, torch.Tensor], kind: torch.dtype = torch.float32) -> Pairs:
    torch.manual_seed(0)
    student = {layer: torch.randn(5, 3).to(kind).requires_grad_() for layer in (0, 4)}
    modules = {str(layer): projection(3, 7) for layer in teacher}
    return Pairs(student, teacher, torch.nn.ModuleDict(modules))


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_states_that_project_onto_the_teachers_have_no_distance(distance):
    found = pairs({6: torch.zeros(5, 7)})
    exact = found.projections["6"](found.student_ND[4]).detach()
    value_N = replace(found, teacher_NE={6: exact}).value(layers={6: 4}, distance=distance)
    torch.testing.assert_close(value_N, torch.zeros(5), atol=1e-6, rtol=0)


def test_distances_are_means_over_width_and_layers():
    teacher = {layer: torch.randn(5, 7) for layer in (3, 6)}
    found = pairs(teacher)
    layers = {3: 0, 6: 4}
    squared, cosine = [], []
    for teacher_layer, student_layer in layers.items():
        states_NE = found.projections[str(teacher_layer)](found.student_ND[student_layer])
        target_NE = teacher[teacher_layer]
        squared.append(((states_NE - target_NE) ** 2).sum(-1) / 7)
        norms_N = states_NE.norm(dim=-1) * target_NE.norm(dim=-1)
        cosine.append(1 - (states_NE * target_NE).sum(-1) / norms_N)
    for distance, parts in (("mse", squared), ("cosine", cosine)):
        value_N = found.value(layers=layers, distance=distance)
        torch.testing.assert_close(value_N, (parts[0] + parts[1]) / 2)


def test_bfloat16_bits_are_decoded_without_loss():
    states_NE = torch.randn(4, 6).bfloat16()
    bits = states_NE.view(torch.int16)
    for shipped in (bits, bits.view(torch.uint16)):
        assert torch.equal(decoded_states(shipped), states_NE.float())
    wide_NE = torch.randn(4, 6)
    assert decoded_states(wide_NE) is wide_NE


def test_a_narrow_student_learns_through_a_wide_projection():
    found = pairs({6: torch.randn(5, 7)}, kind=torch.bfloat16)
    value_N = found.value(layers={6: 4}, distance="cosine")
    assert value_N.dtype == torch.float32
    value_N.sum().backward()
    assert found.student_ND[4].grad.dtype == torch.bfloat16
    assert found.student_ND[4].grad.norm() > 0
    assert found.projections["6"].weight.grad.norm() > 0

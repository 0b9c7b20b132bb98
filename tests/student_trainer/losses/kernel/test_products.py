"""The three products with the head, for every mix of types, against float64."""

import pytest
import torch

from student_trainer.losses.kernel import products
from tests.allocations import largest_tensor
from tests.student_trainer.losses.dense import relative_error

KINDS = [torch.float32, torch.bfloat16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden_kind", KINDS)
@pytest.mark.parametrize("weight_kind", KINDS)
def test_products_accumulate_wide(device, hidden_kind, weight_kind, monkeypatch):
    monkeypatch.setattr(products, "WIDENED_BYTES", 4 * 16 * 30)
    torch.manual_seed(0)
    hidden_ND = torch.randn(9, 16, device=device).to(hidden_kind)
    weight_VD = torch.randn(100, 16, device=device).to(weight_kind)
    grad_NV = torch.randn(9, 100, device=device)
    out_NV, out_ND = grad_NV.new_empty(9, 100), torch.empty_like(hidden_ND)
    sum_VD = grad_NV.new_full((100, 16), torch.nan)
    products.logits_product(hidden_ND, weight_VD, out_NV=out_NV)
    products.hidden_product(grad_NV, weight_VD, out_ND=out_ND)
    for first in (True, False):
        products.weight_product(grad_NV, hidden_ND, narrow=weight_kind, sum_VD=sum_VD, first=first)
    hidden, weight, grad = (x.double() for x in (hidden_ND, weight_VD, grad_NV))
    narrow_grad = device == "cuda" and hidden_kind == weight_kind == torch.bfloat16
    assert relative_error(out_NV, hidden @ weight.t()) < 1e-6
    assert relative_error(sum_VD, 2 * grad.t() @ hidden) < (2**-8 if narrow_grad else 1e-6)
    exact_out = hidden_kind == torch.float32
    assert relative_error(out_ND, grad @ weight) < (1e-6 if exact_out else 2**-7)


def test_a_narrow_head_is_never_widened_whole(monkeypatch):
    monkeypatch.setattr(products, "WIDENED_BYTES", 4 * 16 * 30)
    hidden_ND = torch.randn(2, 16).bfloat16()
    weight_VD = torch.randn(100, 16).bfloat16()
    out_NV = torch.empty(2, 100)

    def call() -> None:
        products.logits_product(hidden_ND, weight_VD, out_NV=out_NV)
        products.hidden_product(out_NV, weight_VD, out_ND=torch.empty_like(hidden_ND))

    assert largest_tensor(call) <= 30 * 16

"""The three products with the head that a chunk needs, accumulated in float32.

Where states and head are narrower than the logits, CUDA multiplies them as they are into float32;
elsewhere the head is widened a few rows at a time, so that logits are never rounded to bfloat16
and no wide copy of the head exists.

N positions of a chunk   D hidden width   V student vocabulary
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDENED_BYTES = 16 * 2**20


def logits_product(hidden_ND: Tensor, weight_VD: Tensor, *, out_NV: Tensor) -> None:
    """out = hidden weight^T."""
    kind = out_NV.dtype
    if weight_VD.dtype == kind:
        torch.mm(hidden_ND.to(kind), weight_VD.t(), out=out_NV)
    elif _multiplies_into_wide(hidden_ND, weight_VD):
        torch.mm(hidden_ND, weight_VD.t(), out_dtype=kind, out=out_NV)
    else:
        wide_ND = hidden_ND.to(kind)
        for part, wide_PD in _widened(weight_VD, kind):
            torch.mm(wide_ND, wide_PD.t(), out=out_NV[:, part])


def hidden_product(grad_NV: Tensor, weight_VD: Tensor, *, out_ND: Tensor) -> None:
    """out = grad weight, computed wide and rounded once to the type of `out`."""
    if weight_VD.dtype == grad_NV.dtype == out_ND.dtype:
        torch.mm(grad_NV, weight_VD, out=out_ND)
    elif weight_VD.dtype == grad_NV.dtype:
        out_ND.copy_(grad_NV @ weight_VD)
    elif _multiplies_into_wide(out_ND, weight_VD):
        out_ND.copy_(grad_NV.to(weight_VD.dtype) @ weight_VD)
    else:
        wide_ND = torch.zeros(out_ND.shape, dtype=grad_NV.dtype, device=out_ND.device)
        for part, wide_PD in _widened(weight_VD, grad_NV.dtype):
            wide_ND.addmm_(grad_NV[:, part], wide_PD)
        out_ND.copy_(wide_ND)


def weight_product(
    grad_NV: Tensor, hidden_ND: Tensor, *, narrow: torch.dtype, sum_VD: Tensor, first: bool
) -> None:
    """sum += grad^T hidden, or sum = grad^T hidden for the first chunk.

    `narrow` is the head's own type, in which CUDA multiplies when the states share it.
    """
    beta = 0 if first else 1
    if narrow != sum_VD.dtype and hidden_ND.is_cuda and hidden_ND.dtype == narrow:
        left_VN = grad_NV.to(narrow).t()
        kind = sum_VD.dtype
        torch.addmm(sum_VD, left_VN, hidden_ND, out_dtype=kind, beta=beta, out=sum_VD)
    else:
        torch.addmm(sum_VD, grad_NV.t(), hidden_ND.to(sum_VD.dtype), beta=beta, out=sum_VD)


def _multiplies_into_wide(left: Tensor, right: Tensor) -> bool:
    return left.is_cuda and left.dtype == right.dtype


def _widened(weight_VD: Tensor, kind: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `kind`, a block of rows at a time."""
    rows = max(1, WIDENED_BYTES // (weight_VD.shape[1] * kind.itemsize))
    for start in range(0, weight_VD.shape[0], rows):
        part = slice(start, start + rows)
        yield part, weight_VD[part].to(kind)

"""Muon: momentum whose updates of matrices are made nearly orthogonal (Jordan et al. 2024)."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from cluster.builtin.team import Team

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's quintic
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` without weight decay, its products in a dtype of choice: that one's are in
    bfloat16, with which a processor that lacks instructions for it takes seconds for a step.

    The processes of a team each make a part of the updates and exchange them.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        team: Team | None = None,
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self.dtype, self.team = dtype, team or Team()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix; each has a gradient."""
        for group in self.param_groups:
            matrices, team = group["params"], self.team
            updates = torch.zeros(sum(matrix.numel() for matrix in matrices))
            parts = updates.split([matrix.numel() for matrix in matrices])
            for number, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
                direction = self._direction(matrix, momentum=group["momentum"])
                if number % team.size == team.rank:
                    part.copy_(orthogonalised(direction.to(self.dtype)).flatten())
            team.add_up(updates)
            for matrix, part in zip(matrices, parts, strict=True):
                rows, columns = matrix.shape
                stretch = math.sqrt(max(1.0, rows / columns))
                matrix.add_(part.view_as(matrix), alpha=-group["lr"] * stretch)

    def _direction(self, matrix: nn.Parameter, *, momentum: float) -> torch.Tensor:
        """Nesterov's, from the gradient and its running mean."""
        grad, state = matrix.grad, self.state[matrix]
        assert grad is not None, "every matrix takes part in the loss"
        if not state:
            state["mean"] = torch.zeros_like(grad)
        return grad.lerp(state["mean"].lerp_(grad, 1 - momentum), momentum)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, between about .5 and 1.5."""
    a, b, c = NEWTON_SCHULZ
    found = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if matrix.shape[0] > matrix.shape[1] else found

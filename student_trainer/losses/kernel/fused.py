"""The fast path: a token loss and its gradient in one pass over chunks of positions.

The weights of all tokens are known in the forward pass, so each chunk evaluates its loss, forms
the gradient of its logits in place, and adds it to the gradients of hidden states and head. That
takes three products with the head; only those gradients stay. The backward pass scales them.

For one temperature T, with g the loss's derivatives with respect to the log-probabilities of the
ids and g_tail with respect to that of the tail, the gradient of the logits is

    (scatter_add(g) + g_tail softmax_over_complement - softmax (sum(g) + g_tail)) / T.

N positions   n positions of a chunk   D hidden width   V student vocabulary
M ids asked about per position   J values reported per position
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.losses.across.grouped import GroupedWorkspace
from student_trainer.losses.kernel.chunk import ChunkWorkspace, LogProbs, Slopes
from student_trainer.losses.kernel.primitive import Head, chunks, default_chunk_rows, precision
from student_trainer.losses.kernel.products import hidden_product, weight_product
from student_trainer.losses.kernel.whole import WholeWorkspace, whole_chunk_rows

Workspace = ChunkWorkspace | GroupedWorkspace | WholeWorkspace
PART_BYTES = 4 * 2**20  # of logits that are evaluated at a time, to stay in a core's cache
# The same on an accelerator over a whole vocabulary, where five such tensors are computed of them.
ACCELERATOR_PART_BYTES = 64 * 2**20


class TokenObjective(Protocol):
    """A loss per position that sees nothing but log-probabilities of the ids it names."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures it wants log-probabilities at."""
        ...

    @property
    def num_ids(self) -> int:
        """M."""
        ...

    @property
    def num_values(self) -> int:
        """J."""
        ...

    @property
    def kept_prefix(self) -> int | None:
        """K where the kept ids are the first K of the vocabulary, ascending: `select` is not asked
        then, and the log-probabilities are those of these K alone."""
        ...

    @property
    def group_V(self) -> Tensor | None:
        """The group of each id, where the ids asked about are names of groups but for the last of
        each position; None: they are ids."""
        ...

    def select(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Ids [n,M] and which of them are kept [n,M], each id of the selection marked once."""
        ...

    def teacher_logits(self, rows: slice, *, buffer: Tensor | None) -> Tensor | None:
        """The teacher's logits of a chunk, in `buffer`, those of the chunk before, if that is
        given; None where it ships log-probabilities."""
        ...

    def evaluate(
        self, rows: slice, student: Sequence[LogProbs], teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss [n], differentiable in `student`, and values to report [n,J]."""
        ...


@dataclass(frozen=True, slots=True)
class Gradients:
    """Sums over chunks in the precision of the logits; None where none is wanted."""

    hidden_ND: Tensor | None = None  # in the type of the hidden states
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether any is."""
        return any(g is not None for g in (self.hidden_ND, self.weight_VD, self.bias_V))

    def add(self, grad_nV: Tensor, hidden_ND: Tensor, head: Head, *, rows: slice) -> None:
        """Add what the chunk `rows` contributes."""
        if self.hidden_ND is not None:
            hidden_product(grad_nV, head.weight_VD, out_ND=self.hidden_ND[rows])
        if self.weight_VD is not None:
            weight_product(
                grad_nV,
                hidden_ND[rows],
                narrow=head.weight_VD.dtype,
                sum_VD=self.weight_VD,
                first=rows.start == 0,
            )
        if self.bias_V is not None:
            self.bias_V.add_(grad_nV.sum(0))


def fused_token_loss(
    hidden_ND: Tensor, head: Head, *, objective: TokenObjective, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The summed loss (scalar, differentiable once) and the reported values [N,J].

    Gradients flow to hidden states, head weight and bias as far as they require one; the backward
    pass may run once. With no positions the loss is 0 and its gradients are zeros, through the
    same autograd node.
    """
    rows = chunk_rows or default_chunk_rows(head.vocabulary, num_ids=objective.num_ids)
    if chunk_rows is None and objective.kept_prefix is not None:
        rows = whole_chunk_rows(head.vocabulary)
    return _FusedTokenLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, objective, rows, torch.is_grad_enabled()
    )


class _FusedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        objective: TokenObjective,
        chunk_rows: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [with_gradients and flag for flag in ctx.needs_input_grad[:3]]
        gradients = _empty_gradients(hidden_ND, head, wanted=wanted)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            loss_N, values_NJ = _run(
                hidden_ND, head, objective=objective, gradients=gradients, chunk_rows=chunk_rows
            )
        ctx.gradients = (
            gradients.hidden_ND,
            _as(gradients.weight_VD, weight_VD),
            _as(gradients.bias_V, bias_V),
        )
        ctx.mark_non_differentiable(values_NJ)
        return loss_N.sum(), values_NJ

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_loss, _ = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients are scaled in place, so backward runs once"
        if grad_loss.is_cuda or grad_loss.item() != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (*gradients, None, None, None, None)


def _run(
    hidden_ND: Tensor,
    head: Head,
    *,
    objective: TokenObjective,
    gradients: Gradients,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    num_rows, kind = len(hidden_ND), precision(hidden_ND)
    loss_N = hidden_ND.new_zeros(num_rows, dtype=kind)
    values_NJ = hidden_ND.new_zeros((num_rows, objective.num_values), dtype=kind)
    if num_rows == 0:
        return loss_N, values_NJ
    slices = list(chunks(num_rows, rows_per_chunk=chunk_rows))
    workspace = _workspace(
        hidden_ND,
        head,
        objective=objective,
        rows=max(rows.stop - rows.start for rows in slices),
        gradients=gradients.wanted,
    )
    teacher_nW = None
    for rows in slices:
        workspace.load(hidden_ND[rows])
        teacher_nW = objective.teacher_logits(rows, buffer=teacher_nW)
        for part in parts(rows.stop - rows.start, workspace, on=hidden_ND.device.type):
            place = slice(rows.start + part.start, rows.start + part.stop)
            if isinstance(workspace, WholeWorkspace):
                student = workspace.log_probs(part)
            else:
                student = workspace.log_probs(part, *objective.select(place))
            loss_N[place], values_NJ[place], slopes = _evaluated(
                objective,
                student,
                rows=place,
                teacher_logits=None if teacher_nW is None else teacher_nW[part],
                differentiate=gradients.wanted,
            )
            if gradients.wanted:
                workspace.to_gradient(part, slopes)
        if gradients.wanted:
            gradients.add(workspace.gradient_nV, hidden_ND, head, rows=rows)
    return loss_N, values_NJ


def parts(num_rows: int, workspace: Workspace, *, on: str) -> Iterator[slice]:
    """Slices of a chunk that are evaluated one at a time on a type of device: an accelerator takes
    the chunk as a whole where little is computed of its logits."""
    row_bytes = 4 * workspace.head.vocabulary
    if on == "cpu":
        rows = PART_BYTES // row_bytes
    elif isinstance(workspace, WholeWorkspace):
        rows = ACCELERATOR_PART_BYTES // row_bytes
    else:
        rows = num_rows
    return chunks(num_rows, rows_per_chunk=max(1, rows))


def _workspace(
    hidden_ND: Tensor, head: Head, *, objective: TokenObjective, rows: int, gradients: bool
) -> Workspace:
    shared: dict[str, Any] = {
        "like_ND": hidden_ND,
        "temperatures": objective.temperatures,
        "rows": rows,
    }
    if objective.group_V is not None:
        return GroupedWorkspace(head, group_V=objective.group_V, **shared)
    if objective.kept_prefix is None:
        return ChunkWorkspace(head, gradients=gradients, **shared)
    return WholeWorkspace(head, kept=objective.kept_prefix, **shared)


def _evaluated(
    objective: TokenObjective,
    student: Sequence[LogProbs],
    *,
    rows: slice,
    teacher_logits: Tensor | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor, list[Slopes | None]]:
    """Loss, values, and the loss's derivatives per temperature (None: it does not depend on it)."""
    inputs = [tensor for probs in student for tensor in (probs.ids_nM, probs.tail_n)]
    slopes: list[Slopes | None] = [None] * len(student)
    if not differentiate:
        return *objective.evaluate(rows, student, teacher_logits), slopes
    with torch.enable_grad():
        for tensor in inputs:
            tensor.requires_grad_()
        loss_n, values_nJ = objective.evaluate(rows, student, teacher_logits)
        total = loss_n.sum()
    if not loss_n.requires_grad:  # a loss of other things than logits: the gradient is zero
        slopes[-1] = Slopes(*(torch.zeros_like(tensor) for tensor in inputs[-2:]))
        return loss_n, values_nJ, slopes
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    for index, (ids_nM, tail_n) in enumerate(zip(found[::2], found[1::2], strict=True)):
        if ids_nM is not None or tail_n is not None:
            slopes[index] = Slopes(
                _or_zeros(ids_nM, inputs[2 * index]), _or_zeros(tail_n, inputs[2 * index + 1])
            )
    return loss_n.detach(), values_nJ.detach(), slopes


def _empty_gradients(hidden_ND: Tensor, head: Head, *, wanted: Sequence[bool]) -> Gradients:
    kind, weight_VD = precision(hidden_ND), head.weight_VD
    # The first chunk overwrites the weight's sum; without any chunk it has to be zero.
    fresh = weight_VD.new_empty if len(hidden_ND) else weight_VD.new_zeros
    return Gradients(
        hidden_ND=hidden_ND.new_empty(hidden_ND.shape) if wanted[0] else None,
        weight_VD=fresh(weight_VD.shape, dtype=kind) if wanted[1] else None,
        bias_V=weight_VD.new_zeros(head.vocabulary, dtype=kind) if wanted[2] else None,
    )


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if gradient is None or parameter is None:
        return None
    return gradient.to(parameter.dtype)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient

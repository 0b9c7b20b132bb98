"""A student's output on embeddings that are moved against it (Miyato et al., arXiv 1605.07725).

B lines   T tokens   D width of the embeddings
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.terms.cross_entropy import CrossEntropy
from student_trainer.losses.token_losses import token_losses

if TYPE_CHECKING:
    from student_trainer.models.student import Student


def moved_output(
    student: "Student", batch: Mapping[str, Tensor], options: Mapping[str, bool], *, size: float
) -> Any:
    """The model's output where the embedding of every token is moved by `size` along the gradient
    of the labels' NLL, which itself has none; of a token without a gradient by nothing. Takes a
    pass and its backward pass for the gradient, and a pass for the output."""
    leaves: list[Tensor] = []

    def keep(embedded_BTD: Tensor) -> Tensor:
        leaves.append(embedded_BTD.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), _embedding(student, keep):
        _, hidden_ND = student.outputs(batch, {})
        head = student.output_head()
        bias = None if head.bias_V is None else head.bias_V.detach()
        fixed = Head(head.weight_VD.detach(), bias, head.logit_scale, head.soft_cap)
        terms = {"nll": CrossEntropy(SimpleNamespace(weight=1.0))}
        loss = token_losses(hidden_ND, fixed, label_N=batch["label_N"], terms=terms).loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    moves = iter([size * normalize(own, dim=-1) for own in gradients])
    with _embedding(student, lambda embedded_BTD: embedded_BTD + next(moves)):
        output, _ = student.outputs(batch, options)
    return output


@contextmanager
def _embedding(student: "Student", change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What becomes of the embedded tokens of every pass in a `with`."""
    table: Any = student.decoder.get_input_embeddings()  # type: ignore[operator]
    hook = table.register_forward_hook(lambda _module, _inputs, embedded: change(embedded))
    try:
        yield
    finally:
        hook.remove()

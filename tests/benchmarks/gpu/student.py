"""A student's micro-batch, forward and backward, under different losses, its layers checkpointed.

N positions   D width   V vocabulary
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from tests.benchmarks.gpu.product import loss_of
from tests.benchmarks.gpu.sections import Case, Numbers, timed
from tests.benchmarks.gpu.sizes import Sizes
from tests.benchmarks.losses import Problem, Size

LossOf = Callable[[Tensor, Tensor, Problem], Tensor]


def token_loss(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem) -> Tensor:
    """Forward KL on the ids that a teacher ships."""
    label_N, targets = problem.label_N, problem.shipped
    return loss_of(hidden_ND, weight_VD, label_N, kind="forward_kl", targets=targets)


def dense_kl(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem) -> Tensor:
    """Forward KL over the whole vocabulary, from a teacher's states and its head."""
    head = TeacherHead(Head(problem.teacher_VD), len(problem.teacher_VD))
    targets = TeacherStates(problem.teacher_ND, head)
    label_N = problem.label_N
    return loss_of(hidden_ND, weight_VD, label_N, kind="forward_kl", targets=targets)


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem) -> Tensor:
    """The product's, on hard labels."""
    return loss_of(hidden_ND, weight_VD, problem.label_N, kind="cross_entropy", targets=None)


def full_logits(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem) -> Tensor:
    """Cross-entropy from full logits, as `transformers` has it."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    return nn.functional.cross_entropy(logits_NV, problem.label_N, reduction="sum")


LOSSES: dict[str, LossOf] = {
    "token loss, 64 ids": token_loss,
    "dense KL": dense_kl,
    "cross-entropy": cross_entropy,
    "cross-entropy, full logits": full_logits,
}


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Mapping[str, Case]:
    """One model, one case for each loss."""
    model = sizes.student.random(device, dtype).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return {name: partial(step, model, loss, sizes, device) for name, loss in LOSSES.items()}


def step(model: nn.Module, loss: LossOf, sizes: Sizes, device: torch.device) -> Numbers:
    """Seconds of forward and backward, and the peak above weights and their gradients."""
    rows, tokens = sizes.step
    shape = sizes.student
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    size = Size(rows * tokens, shape.width, shape.vocabulary, dtype=dtype, device=device.type)
    problem = Problem.random(size)
    ids_BT = torch.randint(shape.vocabulary, (rows, tokens), device=device)
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]

    def once() -> None:
        hidden_BTD = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        (loss(hidden_BTD.flatten(0, 1), head.weight, problem) / (rows * tokens)).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None, "every weight learns"
            parameter.grad.zero_()

    return {"tokens": rows * tokens, **timed(once, device, sizes.rounds)}

"""What every probe of a student's model needs: ids to read, and the model as it is when evaluated.

B lines   T tokens
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def probe_ids(model: PreTrainedModel, *, length: int) -> Tensor:
    """Fixed token ids [1, T] that differ from each other where the vocabulary allows."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment,union-attr]
    return ((3 + torch.arange(length)[None] * 7) % rows).to(model.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode before outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

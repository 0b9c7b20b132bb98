"""What every probe of a student's model needs: ids to read, the model as it is when evaluated, and
what it makes of a text.

B lines   T tokens   V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def probe_ids(model: PreTrainedModel, *, length: int) -> Tensor:
    """Fixed token ids [1, T] that differ from each other where the vocabulary allows."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment,union-attr]
    return ((3 + torch.arange(length)[None] * 7) % rows).to(model.device)


def label_logprobs(ids_T: Tensor, logits_TV: Tensor) -> np.ndarray:
    """Log-probability of each token of a text but the first, after those before it [T - 1], nats,
    on the CPU."""
    logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
    return logprobs_TV.gather(1, ids_T[1:, None])[:, 0].cpu().numpy()


def empties_padding(model: PreTrainedModel) -> bool:
    """Whether loading zeroes the embedding of the padding token, whatever the file holds, as where
    a class of transformers initialises it past the mark of what was loaded."""
    if model.is_custom_code():  # transformers leaves alone what such a model has loaded
        return False
    row_11 = nn.Embedding(1, 1, padding_idx=0)
    nn.init.ones_(row_11.weight)
    row_11.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            model._init_weights(row_11)
    except Exception:  # of a class that initialises no layer of its own alone
        return False
    return not row_11.weight.any()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode before outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

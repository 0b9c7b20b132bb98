"""Probes of a student's model: ids to read, the model as it is when evaluated, what it makes of a
text, and the decoder and head that it is taken apart into, which must reproduce its logits.

B lines   T tokens   V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.errors import ConfigError
from shared.loading import first_line
from shared.model_parts import ROUTED, decoder_of, logit_formulas, seeing_part_of, tolerance
from student_trainer.losses.kernel.primitive import Head


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


@dataclass(frozen=True, slots=True)
class Parts:
    """Decoder and head of a model, with logits = cap(scale * (head(hidden)))."""

    decoder: nn.Module
    head: nn.Linear
    logit_scale: float
    soft_cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32 as the loss has them, for probes only: they are as wide as the
        vocabulary."""
        weight, bias = self.head.weight, self.head.bias
        return Head(weight, bias, self.logit_scale, self.soft_cap).logits(hidden)


def take_apart(model: PreTrainedModel, *, name: str, sees: bool = False) -> Parts:
    """Find decoder, head and what stands between head and logits, and prove it on a probe; of one
    that `sees` the decoder takes the pixels of images too.

    Raises ConfigError if decoder and head do not reproduce the model's logits.
    """
    head, decoder = model.get_output_embeddings(), (seeing_part_of if sees else decoder_of)(model)
    if sees and decoder is None:
        raise ConfigError(
            f"student.model: {name} has no part that takes the pixels of images beside token ids; "
            "choose another student, or set task=language_model"
        )
    if not isinstance(head, nn.Linear) or decoder is None:
        raise ConfigError(f"student.model: {name} has no decoder with a linear output head")
    ids = probe_ids(model, length=16)
    try:
        with torch.no_grad(), evaluating(model):
            whole = model(input_ids=ids, use_cache=False).logits.float()
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            other = torch.cat([ids[:, :8], ids[:, 8:].flip(1)], dim=1)  # from half of it onwards
            start = decoder(input_ids=other, use_cache=False).last_hidden_state[:, :8]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model's own code
        routed = getattr(model.config.get_text_config(), ROUTED, False)  # some cannot say
        way_out = f"set {ROUTED} in its config.json to false, or " if routed else ""
        raise ConfigError(
            f"student.model: {name} cannot read {ids.shape[1]} tokens: {first_line(error)}; "
            f"{way_out}choose another student"
        ) from error
    if not bool(whole.isfinite().all()):
        raise ConfigError(
            f"student.model: the logits of {name} are not finite in {str(model.dtype)[6:]}; look "
            "at its weights and its config.json"
        )
    if not _agree(hidden[:, :8], start, model.dtype):
        raise ConfigError(
            f"student.model: the state of a token of {name} depends on those that follow it; "
            "choose a student that reads from left to right"
        )
    for formula in logit_formulas(model.config.get_text_config()):
        parts = Parts(decoder, head, formula.scale, formula.soft_cap)
        if hidden.shape[-1] == head.in_features and _agree(
            parts.logits(hidden), whole, model.dtype
        ):
            return parts
    raise ConfigError(
        f"student.model: {name} does more than a linear head between hidden states and "
        "logits, so its loss cannot be computed in chunks; choose another student"
    )


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits, or states, are the same but for the rounding of a dtype."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance(dtype) * expected.abs().max())

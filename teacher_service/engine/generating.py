"""Writing on: a batch of openings continued by transformers' own generation, with its KV cache.

A token is drawn by adding Gumbel noise to the logits and taking the largest, where the noise is a
function of (seed, opening, position) alone. So a continuation does not depend on its neighbours in
the batch, but for float ties: a padded batch rounds the last bits of logits otherwise than a row
alone, which shows where two candidates are that close.

B openings   L padded length   V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor

from shared.errors import ConfigError, HandshakeError
from shared.targets.generation import Continuations, GenerationSpec, Openings

PAD_ID = 0  # hidden by the attention mask


class GumbelNoise(transformers.LogitsProcessor):
    """Makes the largest logit of each row a draw from its softmax at a temperature."""

    def __init__(self, spec: GenerationSpec, openings: Openings, *, width: int) -> None:
        self._temperature, self._width = spec.temperature, width
        seed = spec.seed.to_bytes(8, "little", signed=True)
        self._keys = [xxhash.xxh3_128_intdigest(seed + digest) for digest in openings.hashes()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits [B, V] for the position after `input_ids` [B, L]."""
        position, (_, size) = input_ids.shape[1] - self._width, scores.shape
        noise_BV = np.stack([_gumbel(key, position, size) for key in self._keys])
        return scores / self._temperature + torch.from_numpy(noise_BV).to(scores)


def _gumbel(key: int, position: int, size: int) -> np.ndarray:
    """Standard Gumbel numbers: those of `position` are a stream of their own under `key`."""
    stream = np.random.Philox(key=key, counter=[0, 0, 0, position])
    return -np.log(np.random.Generator(stream).standard_exponential(size))


def refuse_openings(openings: Openings, spec: GenerationSpec, *, vocab: int, limit: int | None):
    """Questions that no retry can answer. Raises ConfigError or HandshakeError."""
    if spec.max_new_tokens < 1 or spec.temperature < 0:
        raise ConfigError(f"{spec.in_words()} cannot be written; ask for 1 token, at 0 or more")
    for name, ids in zip(openings.names(), openings.ids(), strict=True):
        if not len(ids):
            raise ConfigError(f"{name} has no token to start from; give it some text")
        if limit is not None and len(ids) + spec.max_new_tokens > limit:
            raise HandshakeError(
                f"{name} has {len(ids)} tokens and is to be continued by {spec.max_new_tokens}, "
                f"but the teacher's context is {limit}; shorten it or ask for fewer"
            )
        if not 0 <= ids.min() <= ids.max() < vocab:
            raise HandshakeError(
                f"{name} holds token id {ids.max()} and the teacher knows {vocab}; use its own "
                "tokenizer"
            )


@torch.inference_mode()
def generate(
    model: Any,
    openings: Openings,
    spec: GenerationSpec,
    *,
    device: torch.device,
    teacher: dict[str, str],
) -> Continuations:
    """Continue a batch at once, padded on the left. The model's own defaults play no part."""
    width = max(map(len, openings.ids()), default=0)
    input_ids_BL = np.full((len(openings), width), PAD_ID, np.int64)
    mask_BL = np.zeros_like(input_ids_BL)
    for line, ids in enumerate(openings.ids()):
        input_ids_BL[line, width - len(ids) :] = ids
        mask_BL[line, width - len(ids) :] = 1
    processors = [GumbelNoise(spec, openings, width=width)] if spec.temperature else []
    model.generation_config = transformers.GenerationConfig()
    written_BL = model.generate(
        torch.from_numpy(input_ids_BL).to(device),
        attention_mask=torch.from_numpy(mask_BL).to(device),
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=list(spec.stop_ids) or None,
        pad_token_id=spec.stop_ids[0] if spec.stop_ids else None,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList(processors),
    )
    ended = [_until(row, spec.stop_ids) for row in written_BL[:, width:].tolist()]
    return Continuations.build(
        openings,
        spec,
        teacher=teacher,
        output_ids=[ids for ids, _ in ended],
        stopped=[stopped for _, stopped in ended],
    )


def _until(ids: Sequence[int], stop_ids: tuple[int, ...]) -> tuple[Sequence[int], bool]:
    """What stands before the first stop id, and whether there is one."""
    first = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:first], first < len(ids)

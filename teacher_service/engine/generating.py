"""Writing on: a batch of openings continued by transformers' own generation, with its KV cache.

A token is drawn by adding Gumbel noise to the logits and taking the largest, where the noise is a
function of (seed, opening, position) alone. So a continuation does not depend on its neighbours in
the batch, but for float ties: a padded batch rounds the last bits of logits otherwise than a row
alone, which shows where two candidates are that close.

B openings   L padded length   S tokens that are added   V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor

from shared.data.passes import TOGETHER, Passes
from shared.data.trust import tolerance
from shared.errors import ConfigError, HandshakeError
from shared.targets.generation import Continuations, GenerationSpec, Openings

PAD_ID = 0  # hidden by the attention mask
PROBED_TOKENS = 2


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


def batches(openings: Openings, passes: Passes) -> list[list[int]]:
    """Which openings are continued at once."""
    lengths = [len(ids) for ids in openings.ids()]
    batch_B = passes.group(lengths, lengths)
    return [np.flatnonzero(batch_B == number).tolist() for number in range(len(set(batch_B)))]


@torch.inference_mode()
def generate(
    model: Any,
    openings: Openings,
    spec: GenerationSpec,
    *,
    device: torch.device,
    teacher: dict[str, str],
    together: Sequence[Sequence[int]],
) -> Continuations:
    """Continue openings, those of each batch of `together` at once. The model's own defaults play
    no part."""
    written: dict[int, Sequence[int]] = {}
    names, input_ids = openings.names(), openings.ids()
    model.generation_config = transformers.GenerationConfig()
    for lines in filter(len, together):
        part = Openings.build(
            names=[names[line] for line in lines], input_ids=[input_ids[line] for line in lines]
        )
        written |= dict(zip(lines, _written(model, part, spec, device), strict=True))
    ended = [_until(written[line], spec.stop_ids) for line in range(len(openings))]
    return Continuations.build(
        openings,
        spec,
        teacher=teacher,
        output_ids=[ids for ids, _ in ended],
        stopped=[stopped for _, stopped in ended],
    )


def _written(
    model: Any, openings: Openings, spec: GenerationSpec, device: torch.device
) -> list[list[int]]:
    """What a model adds to openings that are padded on the left to one length."""
    input_ids_BL, mask_BL = _padded(openings)
    width = input_ids_BL.shape[1]
    processors = [GumbelNoise(spec, openings, width=width)] if spec.temperature else []
    written_BL = model.generate(
        torch.from_numpy(input_ids_BL).to(device),
        attention_mask=torch.from_numpy(mask_BL).to(device),
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=list(spec.stop_ids) or None,
        pad_token_id=spec.stop_ids[0] if spec.stop_ids else None,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList(processors),
    )
    return written_BL[:, width:].tolist()


@torch.inference_mode()
def continues_beside(model: Any, *, vocab: int, device: torch.device, dtype: str) -> Passes:
    """What openings may share where an opening is to be continued as it is alone: recurrent models
    may read the padding, or mix the states of a batch."""
    draws = np.random.default_rng(0)
    short, long, equal = (draws.integers(min(3, vocab - 1), vocab, n) for n in (8, 24, 8))
    model.generation_config = transformers.GenerationConfig()
    alone_SV = _first_logits(model, [short], device)
    for other, passes in ((long, TOGETHER), (equal, Passes(padded=False))):
        beside_SV = _first_logits(model, [short, other], device)
        off = (alone_SV - beside_SV).abs().max() / alone_SV.abs().max()
        if off <= tolerance(dtype):
            return passes
    return Passes(padded=False, shared=False)


def _first_logits(model: Any, input_ids: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Logits [S, V] of the first tokens that are added to the first opening: after the opening, and
    after a token that was read with its states."""
    openings = Openings.build(names=["probe"] * len(input_ids), input_ids=input_ids)
    input_ids_BL, mask_BL = _padded(openings)
    found = model.generate(
        torch.from_numpy(input_ids_BL).to(device),
        attention_mask=torch.from_numpy(mask_BL).to(device),
        max_new_tokens=PROBED_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack([logits_BV[0].float() for logits_BV in found.logits])


def _padded(openings: Openings) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [B, L]."""
    width = max(map(len, openings.ids()), default=0)
    input_ids_BL = np.full((len(openings), width), PAD_ID, np.int64)
    mask_BL = np.zeros_like(input_ids_BL)
    for line, ids in enumerate(openings.ids()):
        input_ids_BL[line, width - len(ids) :] = ids
        mask_BL[line, width - len(ids) :] = 1
    return input_ids_BL, mask_BL


def _until(ids: Sequence[int], stop_ids: tuple[int, ...]) -> tuple[Sequence[int], bool]:
    """What stands before the first stop id, and whether there is one."""
    first = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:first], first < len(ids)

"""Writing on: a batch of openings continued by transformers' own generation, with its KV cache.

A token is drawn by adding Gumbel noise to the logits and taking the largest, where the noise is a
function of (seed, opening, position) alone. So a continuation does not depend on its neighbours in
the batch, but for float ties: a padded batch rounds the last bits of logits otherwise than a row
alone, which shows where two candidates are that close.

B openings   L padded length   S tokens that are added   V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor

from shared.data.passes import TOGETHER, Passes, switches_of
from shared.data.trust import tolerance
from shared.errors import ConfigError, HandshakeError
from shared.model_parts import longest_context
from shared.targets.generation import NO_END, Continuations, Drawn, GenerationSpec, Openings
from teacher_service.engine.noise import gumbel

PAD_ID = 0  # hidden by the attention mask
PROBED_TOKENS = 2


class Sampler(transformers.LogitsProcessor):
    """The law that tokens are drawn from, in the one place where it is: logits of the ids below
    `vocab` at a temperature, without stop ids before `min_new_tokens`, cut to the likeliest ids
    that hold `top_p`.

    Keeps the log-probability of every token drawn, under that law.
    """

    def __init__(self, spec: GenerationSpec, openings: Openings, *, width: int) -> None:
        self._spec, self._width = spec, width
        seed = spec.seed.to_bytes(8, "little", signed=True)
        self._of_openings = [seed + digest for digest in openings.hashes()]
        self.logprobs_S: list[Tensor] = []  # of each position [B]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V], the largest of which is drawn after `input_ids` [B, L]."""
        position, spec = input_ids.shape[1] - self._width, self._spec
        if spec.vocab is not None and spec.vocab < scores.shape[1]:
            scores = scores.clone()
            scores[:, spec.vocab :] = -torch.inf
        if position < spec.min_new_tokens and spec.stop_ids:
            scores = scores.index_fill(1, _ids(spec.stop_ids, scores), -torch.inf)
        if not spec.temperature:
            if spec.logprobs:
                self.logprobs_S.append(scores.new_zeros(len(scores)))
            return scores
        law_BV = _likeliest(scores / spec.temperature, spec.top_p)
        keys_B = torch.from_numpy(self._keys(position)).to(scores.device)
        noisy_BV = law_BV + gumbel(keys_B, scores.shape[1]).to(scores)
        if spec.logprobs:
            drawn_B1 = noisy_BV.argmax(-1, keepdim=True)
            self.logprobs_S.append(law_BV.log_softmax(-1).gather(1, drawn_B1)[:, 0])
        return noisy_BV

    def _keys(self, position: int) -> np.ndarray:
        """A key [B], int64, of each opening at a position."""
        place = position.to_bytes(8, "little")
        keys = [xxhash.xxh3_64_intdigest(each + place) for each in self._of_openings]
        return np.array(keys, np.uint64).view(np.int64)


def _ids(stop_ids: tuple[int, ...], scores: Tensor) -> Tensor:
    """The stop ids that the model has."""
    return torch.tensor([i for i in stop_ids if i < scores.shape[1]], device=scores.device)


def _likeliest(logits_BV: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] of the fewest likeliest ids that hold at least `top_p`, -inf for the others;
    of equally likely ones the first."""
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.softmax(-1)
    before_BV = mass_BV.cumsum(-1) - mass_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)
    return torch.full_like(logits_BV, -torch.inf).scatter(1, order_BV, sorted_BV)


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


class ModelGenerator:
    """A causal model of transformers that continues openings; satisfies `Generator`.

    `vocab` is the number of rows of its head. At most `batch_rows` openings, of like lengths, are
    continued at once; None: all that may share a batch.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab: int,
        device: torch.device,
        dtype: str,
        fingerprint: dict[str, str],
        batch_rows: int | None = None,
    ) -> None:
        self._model, self._vocab, self._device, self._dtype = model, vocab, device, dtype
        self._fingerprint, self._batch_rows = fingerprint, batch_rows
        self._text_config = model.config.get_text_config()
        self._passes: Passes | None = None  # not probed yet

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Generator`."""
        limit = longest_context(self._text_config)
        refuse_openings(openings, spec, vocab=self._vocab, limit=limit)
        passes = self._beside()
        if self._switches_within(openings, spec):
            passes = replace(passes, padded=False)
        return generate(
            self._model,
            openings,
            spec,
            device=self._device,
            teacher=self._fingerprint,
            together=batches(openings, passes, most=self._batch_rows),
        )

    def _beside(self) -> Passes:
        """What openings may share, probed once, before the first are continued."""
        if self._passes is None:
            self._passes = continues_beside(
                self._model, vocab=self._vocab, device=self._device, dtype=self._dtype
            )
        return self._passes

    def _switches_within(self, openings: Openings, spec: GenerationSpec) -> bool:
        """Whether a text may grow beyond a length from where the model reads positions otherwise:
        the longest of a batch would decide for all."""
        longest = max(map(len, openings.ids()), default=0) + spec.max_new_tokens
        return any(length < longest for length in switches_of(self._text_config))


def open_generator(
    model: Any,
    *,
    device: torch.device,
    dtype: str,
    batch_rows: int,
    fingerprint: dict[str, str] | None = None,
) -> ModelGenerator:
    """A generator around a student's model, adapters on it included; satisfies `OpenGenerator`.
    `fingerprint` describes it in answers that go to another process."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ModelGenerator(
        whole,
        vocab=len(whole.get_output_embeddings().weight),
        device=device,
        dtype=dtype,
        fingerprint=fingerprint or {"model": "the student"},
        batch_rows=batch_rows,
    )


def batches(openings: Openings, passes: Passes, *, most: int | None = None) -> list[list[int]]:
    """Which openings are continued at once: those that may share a batch, cut into batches of at
    most so many, the shortest first."""
    lengths = [len(ids) for ids in openings.ids()]
    batch_B = passes.group(lengths, lengths)
    found = []
    for number in range(len(set(batch_B))):
        lines = np.flatnonzero(batch_B == number).tolist()
        if most is None or len(lines) <= most:
            found.append(lines)
            continue
        lines.sort(key=lengths.__getitem__)
        found += [lines[first : first + most] for first in range(0, len(lines), most)]
    return found


@torch.no_grad()
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
    written: dict[int, tuple[Sequence[int], np.ndarray]] = {}
    with without_defaults(model):
        for lines in filter(len, together):
            found = _written(model, openings.at(lines), spec, device)
            written |= dict(zip(lines, found, strict=True))
    ids = [written[line][0] for line in range(len(openings))]
    lengths = [_until(each, spec.stop_ids) for each in ids]
    ended = [length < len(each) for each, length in zip(ids, lengths, strict=True)]
    pairs = list(zip(ids, lengths, strict=True))
    drawn = None
    if spec.logprobs:
        until = [length + stopped for length, stopped in zip(lengths, ended, strict=True)]
        drawn = Drawn(
            [written[line][1][:stop] for line, stop in enumerate(until)],
            [int(each[n]) if n < len(each) else NO_END for each, n in pairs],
        )
    return Continuations.build(
        openings,
        spec,
        teacher=teacher,
        output_ids=[each[:length] for each, length in pairs],
        stopped=ended,
        drawn=drawn,
    )


@contextmanager
def without_defaults(model: Any) -> Iterator[None]:
    """A model without generation defaults of its own, for the length of a `with`."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _written(
    model: Any, openings: Openings, spec: GenerationSpec, device: torch.device
) -> list[tuple[list[int], np.ndarray]]:
    """What a model adds to openings that are padded on the left to one length, and the
    log-probabilities where they are asked for."""
    input_ids_BL, mask_BL = _padded(openings)
    width = input_ids_BL.shape[1]
    sampler = Sampler(spec, openings, width=width)
    written_BL = model.generate(
        input_ids=torch.from_numpy(input_ids_BL).to(device),
        attention_mask=torch.from_numpy(mask_BL).to(device),
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=list(spec.stop_ids) or None,
        pad_token_id=spec.stop_ids[0] if spec.stop_ids else None,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList([sampler]),
    )
    logprobs_BS = np.zeros((len(openings), 0), np.float32)
    if spec.logprobs:
        logprobs_BS = torch.stack(sampler.logprobs_S, 1).float().cpu().numpy()
    return list(zip(written_BL[:, width:].tolist(), logprobs_BS, strict=True))


@torch.no_grad()
def continues_beside(model: Any, *, vocab: int, device: torch.device, dtype: str) -> Passes:
    """What openings may share where an opening is to be continued as it is alone: recurrent models
    may read the padding, or mix the states of a batch."""
    draws = np.random.default_rng(0)
    short, long, equal = (draws.integers(min(3, vocab - 1), vocab, n) for n in (8, 24, 8))
    with without_defaults(model):
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
        input_ids=torch.from_numpy(input_ids_BL).to(device),
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


def _until(ids: Sequence[int], stop_ids: tuple[int, ...]) -> int:
    """How many tokens stand before the first stop id, all where there is none."""
    return next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))

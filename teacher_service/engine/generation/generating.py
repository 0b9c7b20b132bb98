"""Writing on: a batch of openings continued by transformers' own generation, with its KV cache.

B openings   L padded length   S tokens that are added   V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from shared.data.passes import TOGETHER, Passes, switches_of
from shared.data.trust import tolerance
from shared.errors import ConfigError, HandshakeError
from shared.model_parts import longest_context
from shared.targets.generation import (
    NO_END,
    Continuations,
    Drawn,
    GenerationSpec,
    Openings,
    Partner,
)
from teacher_service.engine.generation.lock_step import LockStep, MixedSampler, one_more, states_of
from teacher_service.engine.generation.sampler import Sampler

PAD_ID = 0  # hidden by the attention mask
PROBED_TOKENS = 2


class Written(NamedTuple):
    """What a model adds to an opening, padded behind its end."""

    ids: list[int]
    logprobs: np.ndarray  # float32, of each, where they are asked for
    own_logprobs: np.ndarray | None = None  # the model's own, where a partner had a share


Write = Callable[[Sequence[int]], list[Written]]  # continues the openings of some lines


def refuse_openings(openings: Openings, spec: GenerationSpec, *, vocab: int, limit: int | None):
    """Questions that no retry can answer. Raises ConfigError or HandshakeError."""
    if openings.are_forced and not (spec.temperature and spec.logprobs):
        raise ConfigError(
            f"{spec.in_words()} are asked for after first tokens that are given, whose "
            "log-probabilities are answered; ask for these, at a temperature above 0"
        )
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
        self._lock_step: LockStep | None = None  # nor this

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Generator`."""

        def write(lines: Sequence[int]) -> list[Written]:
            own = openings.at(lines)
            padded = _padded(own, self._device)
            if own.are_forced:
                return _listed(*self._in_steps().written(padded, own, spec))
            sampler = Sampler(spec, own, width=padded[0].shape[1])
            return _listed(_sampled(self._model, padded, sampler), sampler.logprobs_BS())

        return self._generate(openings, spec, write)

    def generate_mixed(
        self, openings: Openings, spec: GenerationSpec, partner: Partner
    ) -> Continuations:
        """See `MixedGenerator`."""

        def write(lines: Sequence[int]) -> list[Written]:
            own, beside = openings.at(lines), partner.at(lines)
            padded = _padded(own, self._device)
            sampler = MixedSampler(spec, own, width=padded[0].shape[1], partner=beside)
            written_BS = _sampled(self._model, padded, sampler)
            return _listed(written_BS, sampler.logprobs_BS(), sampler.own_BS())

        return self._generate(openings, spec, write)

    def _generate(self, openings: Openings, spec: GenerationSpec, write: Write) -> Continuations:
        limit = longest_context(self._text_config)
        refuse_openings(openings, spec, vocab=self._vocab, limit=limit)
        passes = self._beside()
        if self._switches_within(openings, spec):
            passes = replace(passes, padded=False)
        together = batches(openings, passes, most=self._batch_rows)
        written: dict[int, Written] = {}
        with torch.no_grad(), without_defaults(self._model):
            for lines in filter(len, together):
                written |= dict(zip(lines, write(lines), strict=True))
        in_order = [written[line] for line in range(len(openings))]
        return continuations(openings, spec, in_order, teacher=self._fingerprint)

    def _beside(self) -> Passes:
        """What openings may share, probed once, before the first are continued."""
        if self._passes is None:
            self._passes = continues_beside(
                self._model, vocab=self._vocab, device=self._device, dtype=self._dtype
            )
        return self._passes

    def _in_steps(self) -> LockStep:
        """What goes on from texts that are given in part, made for the first of them."""
        if self._lock_step is None:
            alike = reads_on(self._model, vocab=self._vocab, device=self._device, dtype=self._dtype)
            self._lock_step = LockStep(self._model, keeps_states=alike)
        return self._lock_step

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


def continuations(
    openings: Openings,
    spec: GenerationSpec,
    written: Sequence[Written],
    *,
    teacher: dict[str, str],
) -> Continuations:
    """What was written, each text up to its end."""
    ids = [one.ids for one in written]
    lengths = [_until(each, spec.stop_ids) for each in ids]
    ended = [length < len(each) for each, length in zip(ids, lengths, strict=True)]
    pairs = list(zip(ids, lengths, strict=True))
    drawn = None
    if spec.logprobs:
        until = [length + stopped for length, stopped in zip(lengths, ended, strict=True)]
        cut = list(zip(written, until, strict=True))
        own = [one.own_logprobs[:stop] for one, stop in cut if one.own_logprobs is not None]
        drawn = Drawn(
            [one.logprobs[:stop] for one, stop in cut],
            [int(each[n]) if n < len(each) else NO_END for each, n in pairs],
            own or None,
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
    """A model without generation defaults of its own, for the length of a `with`. A mixture does
    not compute the loss of its routers, which fails in padded batches with a cache."""
    text = model.config.get_text_config()
    before, routers = model.generation_config, getattr(text, "output_router_logits", None)
    model.generation_config = transformers.GenerationConfig()
    if routers:
        text.output_router_logits = False
    try:
        yield
    finally:
        model.generation_config = before
        if routers:
            text.output_router_logits = routers


def _sampled(model: Any, padded: tuple[Tensor, Tensor], sampler: Sampler) -> Tensor:
    """What a model adds to openings, padded to ids and mask [B, L], until all texts have ended or
    their tokens are used up [B, S]."""
    input_ids_BL, mask_BL = padded
    spec = sampler.spec
    written_BL = model.generate(
        input_ids=input_ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=list(spec.stop_ids) or None,
        pad_token_id=spec.stop_ids[0] if spec.stop_ids else None,
        do_sample=False,
        logits_processor=transformers.LogitsProcessorList([sampler]),
    )
    return written_BL[:, input_ids_BL.shape[1] :]


def _listed(written_BS: Tensor, *logprobs_BS: Tensor) -> list[Written]:
    """Of each opening what was written, its log-probabilities and a model's own."""
    arrays = [values_BS.float().cpu().numpy() for values_BS in logprobs_BS]
    return [Written(*one) for one in zip(written_BS.tolist(), *arrays, strict=True)]


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
    input_ids_BL, mask_BL = _probed(input_ids, device)
    found = model.generate(
        input_ids=input_ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=PROBED_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack([logits_BV[0].float() for logits_BV in found.logits])


@torch.no_grad()
def reads_on(model: Any, *, vocab: int, device: torch.device, dtype: str) -> bool:
    """Whether a model that is given its states back reads on as if it had not stopped, and read
    nothing else meanwhile: some keep states in themselves."""
    draws = np.random.default_rng(0)
    ids, other = (draws.integers(min(3, vocab - 1), vocab, 8) for _ in range(2))
    with without_defaults(model):
        through_SV = _first_logits(model, [ids], device)
        input_ids_BL, mask_BL = _probed([ids], device)
        first = one_more(model, input_ids_BL, mask_BL, {})
        states = states_of(first)
        if not states:
            return False
        one_more(model, *_probed([other], device), {})
        longer_BL = torch.cat([mask_BL, torch.ones_like(mask_BL[:, :1])], 1)
        try:
            second = one_more(model, first.sequences, longer_BL, states)
        except ValueError:  # of transformers, for a model that takes none
            return False
        stepped_SV = torch.stack([found.logits[0][0].float() for found in (first, second)])
    off = (stepped_SV - through_SV).abs().max() / through_SV.abs().max()
    return bool(off <= tolerance(dtype))


def _probed(input_ids: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    openings = Openings.build(names=["probe"] * len(input_ids), input_ids=input_ids)
    return _padded(openings, device)


def _padded(openings: Openings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, L], padded on the left to one length."""
    width = max(map(len, openings.ids()), default=0)
    input_ids_BL = np.full((len(openings), width), PAD_ID, np.int64)
    mask_BL = np.zeros_like(input_ids_BL)
    for line, ids in enumerate(openings.ids()):
        input_ids_BL[line, width - len(ids) :] = ids
        mask_BL[line, width - len(ids) :] = 1
    return torch.from_numpy(input_ids_BL).to(device), torch.from_numpy(mask_BL).to(device)


def _until(ids: Sequence[int], stop_ids: tuple[int, ...]) -> int:
    """How many tokens stand before the first stop id, all where there is none."""
    return next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))

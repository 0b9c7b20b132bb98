"""Two models that write one text in lock step: every token is drawn from a mixture of their laws.

One of them is asked, at every position, to go on from all that is written so far (`forced`), and
keeps what it has read for the next question. The other one flips a coin for who draws the token,
which is a draw from the mixture, and keeps the mixture's log-probability of it (MiniLLM, arXiv
2306.08543, Eq. 4).

B openings   L padded length   S tokens that are written   V vocabulary
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from shared.targets.generation import GenerationSpec, Openings, Partner
from teacher_service.engine.generation.sampler import Sampler, logprob_of, only

MOST_BETWEEN = 64  # steps of other batches, after which the states of one are kept no longer
STATES = ("cache", "past_key_values")  # under one of these names a model gives them and takes them
DRAWN = -1  # in place of a token that is not given

_COIN = b"coin"


class ForcedSampler(Sampler):
    """A sampler that takes what is given; of one position."""

    def __init__(
        self, spec: GenerationSpec, openings: Openings, *, width: int, given_B: Tensor
    ) -> None:
        super().__init__(spec, openings, width=width)
        self._given_B = given_B  # `DRAWN` where the token is drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `Sampler`."""
        position = self.position(input_ids)
        law_BV = self.law(scores, position)
        drawn_B = self.noisy(law_BV, position).argmax(-1)
        token_B = torch.where(self._given_B == DRAWN, drawn_B, self._given_B)
        self.logprobs_S.append(logprob_of(law_BV, token_B))
        return only(token_B, scores)


@dataclass(slots=True)
class _Batch:
    """A batch as far as it is written."""

    input_ids_BL: Tensor  # openings and what is written
    mask_BL: Tensor
    width: int  # of the openings
    logprobs_S: list[Tensor] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)  # after all but the last token
    asked_at: int = 0  # how many steps were asked for until then, of all batches

    @property
    def written_BS(self) -> Tensor:
        """The tokens after the openings."""
        return self.input_ids_BL[:, self.width :]


class LockStep:
    """Goes on from openings whose continuations are given in part, and keeps the states of the
    batches that it was asked about lately: of as many as are written side by side, and of few that
    are finished, as a batch is asked about once a token.

    `keeps_states` says whether this model reads on from states that it gave as if it read all.
    Whether states of a batch are there changes no bit: without them it is read again in the same
    steps.
    """

    def __init__(self, model: Any, *, keeps_states: bool) -> None:
        self._model, self._keeps_states = model, keeps_states
        self._kept: OrderedDict[bytes, _Batch] = OrderedDict()  # asked about last, last
        self._asked = 0

    def written(
        self, padded: tuple[Tensor, Tensor], openings: Openings, spec: GenerationSpec
    ) -> tuple[Tensor, Tensor]:
        """What is written after openings, padded to ids and mask [B, L], tokens and their
        log-probabilities [B, S], as many as the spec has."""
        key = b"".join([repr(replace(spec, max_new_tokens=1)).encode(), *openings.hashes()])
        given_BS = _given(openings, spec.max_new_tokens).to(padded[0].device)
        batch = self._kept.pop(key, None)
        if batch is None or not _begins(batch, given_BS):
            batch = _Batch(*padded, width=padded[0].shape[1])
        for position in range(batch.written_BS.shape[1], spec.max_new_tokens):
            self._step(batch, openings, spec, given_BS[:, position])
        self._asked += 1
        batch.asked_at, self._kept[key] = self._asked, batch
        while self._asked - next(iter(self._kept.values())).asked_at > MOST_BETWEEN:
            self._kept.popitem(last=False)
        return batch.written_BS, torch.stack(batch.logprobs_S, 1)

    def _step(
        self, batch: _Batch, openings: Openings, spec: GenerationSpec, given_B: Tensor
    ) -> None:
        sampler = ForcedSampler(spec, openings, width=batch.width, given_B=given_B)
        found = one_more(self._model, batch.input_ids_BL, batch.mask_BL, batch.states, sampler)
        batch.input_ids_BL = found.sequences
        batch.mask_BL = torch.cat([batch.mask_BL, torch.ones_like(batch.mask_BL[:, :1])], 1)
        batch.logprobs_S += sampler.logprobs_S
        batch.states = states_of(found) if self._keeps_states else {}


def one_more(
    model: Any, input_ids_BL: Tensor, mask_BL: Tensor, states: dict[str, Any], *processors: Any
) -> Any:
    """What transformers' own generation returns that adds one token."""
    return model.generate(
        input_ids=input_ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=transformers.LogitsProcessorList(processors),
        **states,
    )


def states_of(found: Any) -> dict[str, Any]:
    """The states that a generation ended with, by the name under which the next one takes them;
    none of a model that keeps them in a way of its own."""
    named = {name: found.get(name) for name in STATES}
    own = {name: kept for name, kept in named.items() if isinstance(kept, transformers.Cache)}
    return dict([*own.items()][:1])


def _given(openings: Openings, size: int) -> Tensor:
    """The tokens that are given [B, S], `DRAWN` where they are not."""
    given_BS = torch.full((len(openings), size), DRAWN)
    for line, ids in enumerate(openings.forced()):
        own = torch.from_numpy(ids[:size].astype(np.int64))
        given_BS[line, : len(own)] = own
    return given_BS


def _begins(batch: _Batch, given_BS: Tensor) -> bool:
    """Whether what is given goes on with a batch."""
    written_BS = batch.written_BS
    size = written_BS.shape[1]
    if size > given_BS.shape[1]:
        return False
    own_BS = given_BS[:, :size]
    return bool(((own_BS == DRAWN) | (own_BS == written_BS)).all())


class MixedSampler(Sampler):
    """Draws from `share` of a partner's law and the rest of its own.

    Keeps the mixture's log-probability of every token, and its own.
    """

    def __init__(
        self, spec: GenerationSpec, openings: Openings, *, width: int, partner: Partner
    ) -> None:
        super().__init__(spec, openings, width=width)
        self._partner = partner
        self._forced: list[list[int]] = [[] for _ in range(len(openings))]
        self.own_S: list[Tensor] = []  # of each position [B]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `Sampler`."""
        position = self.position(input_ids)
        law_BV = self.law(scores, position)
        own_B = self.noisy(law_BV, position).argmax(-1)
        is_partners_B = self.keys(position, _COIN) * 2.0**-64 < self._partner.share
        token_B, partners_B = self._asked(position, own_B.tolist(), is_partners_B)
        token_B = token_B.to(scores.device)
        logprob_B = logprob_of(law_BV, token_B)
        self.own_S.append(logprob_B)
        self.logprobs_S.append(mixture(logprob_B, partners_B.to(logprob_B), self._partner.share))
        return only(token_B, scores)

    def own_BS(self) -> Tensor:
        """The model's own log-probabilities of what was drawn [B, S]."""
        return torch.stack(self.own_S, 1)

    def _asked(
        self, position: int, own: Sequence[int], is_partners_B: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The token of each opening [B], and the partner's log-probability of it; of texts that
        have ended anything."""
        stop_ids = self.spec.stop_ids
        ended = [bool(ids) and ids[-1] in stop_ids for ids in self._forced]
        asked = [
            [*ids, stop_ids[0]] if over else ids if partners else [*ids, token]
            for ids, over, partners, token in zip(
                self._forced, ended, is_partners_B, own, strict=True
            )
        ]
        spec = replace(self.spec, max_new_tokens=position + 1)
        answer = self._partner.generate(asked, spec)
        logprobs = []
        for line, (ids, logprob) in enumerate(
            zip(answer.written(), answer.logprobs(), strict=True)
        ):
            self._forced[line] = asked[line] if ended[line] else ids.tolist()
            logprobs.append(0.0 if ended[line] else float(logprob[position]))
        return torch.tensor([ids[-1] for ids in self._forced]), torch.tensor(logprobs)


def mixture(own_B: Tensor, partners_B: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q) of tokens, from log q and log p [B]."""
    if share == 1:
        return partners_B
    return torch.logaddexp(math.log(share) + partners_B, math.log1p(-share) + own_B)

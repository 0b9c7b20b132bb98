"""The law that tokens are drawn from, in the one place where it is.

A token is drawn by adding Gumbel noise to the logits and taking the largest, where the noise is a
function of (seed, opening, position) alone. So a continuation does not depend on its neighbours in
the batch, but for float ties: a padded batch rounds the last bits of logits otherwise than a row
alone, which shows where two candidates are that close.

B openings   L padded length   S positions   V vocabulary
"""

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor

from shared.targets.generation import GenerationSpec, Openings
from teacher_service.engine.generation.noise import gumbel


class Sampler(transformers.LogitsProcessor):
    """Draws from logits of the ids below `vocab` at a temperature, without stop ids before
    `min_new_tokens`, cut to the likeliest ids that hold `top_p`.

    Keeps the log-probability of every token drawn, under that law.
    """

    def __init__(self, spec: GenerationSpec, openings: Openings, *, width: int) -> None:
        self.spec, self._width = spec, width
        seed = spec.seed.to_bytes(8, "little", signed=True)
        self._of_openings = [seed + digest for digest in openings.hashes()]
        self.logprobs_S: list[Tensor] = []  # of each position [B]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V], the largest of which is drawn after `input_ids` [B, L]."""
        position, spec = self.position(input_ids), self.spec
        if not spec.temperature:
            if spec.logprobs:
                self.logprobs_S.append(scores.new_zeros(len(scores)))
            return self._allowed(scores, position)
        law_BV = self.law(scores, position)
        noisy_BV = self.noisy(law_BV, position)
        if spec.logprobs:
            self.logprobs_S.append(logprob_of(law_BV, noisy_BV.argmax(-1)))
        return noisy_BV

    def logprobs_BS(self) -> Tensor:
        """The log-probabilities of what was drawn [B, S], S = 0 where they are not asked for."""
        if not self.spec.logprobs:
            return torch.zeros(len(self._of_openings), 0)
        return torch.stack(self.logprobs_S, 1)

    def position(self, input_ids: Tensor) -> int:
        """The place in its continuation of the token that follows `input_ids` [B, L], from 0."""
        return input_ids.shape[1] - self._width

    def law(self, scores: Tensor, position: int) -> Tensor:
        """Logits [B, V] of the distribution that a token is drawn from; no temperature of 0."""
        return _likeliest(self._allowed(scores, position) / self.spec.temperature, self.spec.top_p)

    def noisy(self, law_BV: Tensor, position: int) -> Tensor:
        """A law with the noise of a position; its largest is drawn [B, V]."""
        keys_B = torch.from_numpy(self.keys(position).view(np.int64)).to(law_BV.device)
        return law_BV + gumbel(keys_B, law_BV.shape[1]).to(law_BV)

    def keys(self, position: int, of: bytes = b"") -> np.ndarray:
        """A key [B], uint64, of each opening at a position, another one for each `of`."""
        place = position.to_bytes(8, "little") + of
        keys = [xxhash.xxh3_64_intdigest(each + place) for each in self._of_openings]
        return np.array(keys, np.uint64)

    def _allowed(self, scores: Tensor, position: int) -> Tensor:
        """Logits without the ids that may not be written at a position."""
        spec = self.spec
        if spec.vocab is not None and spec.vocab < scores.shape[1]:
            scores = scores.clone()
            scores[:, spec.vocab :] = -torch.inf
        if position < spec.min_new_tokens and spec.stop_ids:
            scores = scores.index_fill(1, _ids(spec.stop_ids, scores), -torch.inf)
        return scores


def logprob_of(law_BV: Tensor, token_B: Tensor) -> Tensor:
    """Log-probabilities [B] of tokens under laws."""
    return law_BV.log_softmax(-1).gather(1, token_B[:, None])[:, 0]


def only(token_B: Tensor, scores: Tensor) -> Tensor:
    """Logits [B, V] as `scores` has them, of which nothing but these tokens can be drawn."""
    return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


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

"""Reading several continuations of a text from the keys and values of the text, which is read once.

Families keep these in ways of their own, or keep none: what is found so is compared once with what
a model says of text and continuation together, and not used where the two differ.

P texts of one length   T tokens of a text   M continuations   L tokens of the longest
D hidden width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.model_parts import takes, tolerance
from teacher_service.engine.model_parts import Decoder

Tokens = tuple[int, ...]


class Branching:
    """A decoder that goes on from what it has read, as far as it is proven to."""

    def __init__(self, decoder: Decoder, *, dtype: str) -> None:
        self._decoder, self._dtype = decoder, dtype
        self._is_proven: bool | None = None  # None: not tried yet

    def works(self, text_T: Sequence[int], branches: Sequence[Tokens]) -> bool:
        """Whether its states are those of reading each continuation with the text, tried at the
        first call with its longest continuation."""
        if self._is_proven is None:
            longest = max(branches, key=len)
            self._is_proven = self._is_exact(torch.tensor([[*text_T]]), longest)
        return self._is_proven

    @torch.inference_mode()
    def states(self, ids_PT: Tensor, branches: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """The head's input after each text [P, D], and after every token of each continuation
        [P, M, L, D], of which those beyond its own say nothing."""
        texts, length = ids_PT.shape
        whole = self._read(ids_PT, start=0)
        cache = self._kept(whole)
        widest = max(map(len, branches))
        ids_ML = torch.zeros(len(branches), widest, dtype=torch.int64)
        for row, tokens in enumerate(branches):
            ids_ML[row, : len(tokens)] = torch.tensor(tokens)
        cache.batch_repeat_interleave(len(branches))
        after = self._read(ids_ML.repeat(texts, 1), start=length, cache=cache)
        found = after.last_hidden_state.view(texts, len(branches), widest, -1)
        return whole.last_hidden_state[:, -1], found

    def _read(self, ids_BT: Tensor, *, start: int, cache: object = None):
        decoder, module = self._decoder, self._decoder.module
        call = {"input_ids": ids_BT.to(decoder.device), "use_cache": True}
        if decoder.takes_positions:
            place_T = torch.arange(start, start + ids_BT.shape[1])
            call["position_ids"] = place_T.expand(ids_BT.shape).to(decoder.device)
        if cache is not None:
            call["cache" if takes(module, "cache") else "past_key_values"] = cache
        return module(**call)

    def _kept(self, output: object) -> Any:
        found = getattr(output, "cache", None)
        return getattr(output, "past_key_values", None) if found is None else found

    @torch.inference_mode()
    def _is_exact(self, ids_1T: Tensor, branch: Tokens) -> bool:
        try:
            text_1D, after_11LD = self.states(ids_1T, [branch, branch[:1]])
            together_1T = torch.cat([ids_1T, torch.tensor([branch])], dim=1)
            read_1TD = self._decoder.outputs(
                together_1T, torch.arange(together_1T.shape[1])[None]
            ).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the model's own code, as where it keeps nothing of the kind
            return False
        size = len(branch)
        expected_1XD = read_1TD[:, -size - 1 :]
        found_1XD = torch.cat([text_1D[:, None], after_11LD[:, 0]], dim=1)
        off, most = (found_1XD - expected_1XD).abs().max(), expected_1XD.abs().max()
        again = (after_11LD[0, 1, 0] - after_11LD[0, 0, 0]).abs().max()
        return bool(torch.maximum(off, again) <= tolerance(self._dtype) * most)

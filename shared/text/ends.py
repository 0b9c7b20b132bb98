"""Which ids end what a model writes, as the framing of its training text has them."""

from typing import Any

import numpy as np

from shared.text.framing import encode
from shared.text.sources import Document

ANSWERED = Document("pair", "a probe", prompt="a", response="b")


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """eos, and the token that the chat template puts after an answer where that is another one.

    A template whose turns end in plain text gives none. `tokenizer` is a fast one of transformers.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    last = _last_learnt(tokenizer)
    if last is not None and last in tokenizer.added_tokens_decoder and last not in found:
        found.append(last)
    return tuple(found)


def _last_learnt(tokenizer: Any) -> int | None:
    """The last id that an answer teaches, None where the template does not take a plain answer."""
    try:
        (encoded,) = encode(iter([ANSWERED]), tokenizer=tokenizer, loss_on="responses")
    except Exception:  # a template is a program of its author's, and may need what is not there
        return None
    learnt_K = np.flatnonzero(encoded.loss_mask)
    return int(encoded.input_ids[learnt_K[-1] + 1]) if len(learnt_K) else None

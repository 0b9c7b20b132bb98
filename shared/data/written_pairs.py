"""Rows of preferences whose responses models wrote: after the prompt of each document of the data
set the chosen one, and after the same prompt the rejected one, as two documents of one row.

P prompts
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from shared.config.source import TokenSources
from shared.data.packing import Piece, pack
from shared.data.rollouts import RowPrompt, prompts_of
from shared.data.row_store import RaggedRows
from shared.data.rows import Rows

RESPONSES = 2  # that a row has room for, each with its prompt


def pair_prompts(documents: Rows, source: TokenSources, *, context: int) -> list[RowPrompt]:
    """What is gone on from: the prompt of every document, a row each, that leaves room for two
    responses in one row."""
    return prompts_of(documents, source, context=context // RESPONSES)


def pair_rows(
    prompts: Sequence[RowPrompt],
    chosen: Sequence[np.ndarray],
    rejected: Sequence[np.ndarray],
    *,
    context: int,
) -> tuple[RaggedRows, int]:
    """Rows of the pairs, and how many there are: of the ids [P] that were written after prompts,
    their ends among them, two that are alike make none. All that was written has loss, and nothing
    of a prompt."""
    pieces = []
    for prompt, one, other in zip(prompts, chosen, rejected, strict=True):
        if not np.array_equal(one, other):
            first, second = (_document(prompt.input_ids, ids) for ids in (one, other))
            ids, mask = (np.concatenate(parts) for parts in zip(first, second, strict=True))
            key = xxhash.xxh3_64_intdigest(ids.tobytes())
            pieces.append(Piece(key, ids, mask, second=len(first[0])))
    return pack(pieces, context=context), len(pieces)


def _document(prompt: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss mask."""
    ids = np.concatenate([prompt, response]).astype(np.int32)
    mask = np.zeros(len(ids), np.uint8)
    mask[len(prompt) - 1 : -1] = 1
    return ids, mask

"""How many bytes of text the tokens with loss stand for: what bits per byte are bits per.

A tokenizer that says more with a token has fewer tokens and more nats in each; per byte of the same
text, models with different tokenizers can be compared.

T tokens of a document   D documents of some rows
"""

from typing import Protocol

import numpy as np

from shared.data.rows import Rows


class Decoder(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """The text of some ids."""
        ...


def text_bytes(rows: Rows, tokenizer: Decoder) -> np.ndarray:
    """Bytes of each document of some rows, in order, int64 [D].

    They are the UTF-8 bytes by which a document's decoded text grows with its tokens that are
    predicted. A special token has none, nor has the first token of a row, which nothing predicts.
    What a row's edge leaves of a character counts as the three bytes of U+FFFD.
    """
    found = []
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    for ids, starts, mask in zip(*columns, strict=True):
        pairs = zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True)
        found += [_bytes(ids_T, mask_T, tokenizer) for ids_T, mask_T in pairs]
    return np.array(found, np.int64)


def _bytes(ids_T: np.ndarray, mask_T: np.ndarray, tokenizer: Decoder) -> int:
    """Of one document, run by run of tokens that are predicted one after the other."""
    is_label_T = np.concatenate([[0], mask_T[:-1] > 0, [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_label_T))
    first, stop = edges[::2] + 1, edges[1::2] + 1
    ends = zip(first.tolist(), stop.tolist(), strict=True)
    return sum(_length(ids_T[:b], tokenizer) - _length(ids_T[:a], tokenizer) for a, b in ends)


def _length(ids_T: np.ndarray, tokenizer: Decoder) -> int:
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return len(tokenizer.decode(ids_T.tolist(), **plain).encode())

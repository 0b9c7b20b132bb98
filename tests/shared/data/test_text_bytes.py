"""Bytes of the text that tokens with loss stand for."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.data.rows import Rows
from shared.data.text_bytes import text_bytes
from shared.text.documents import Document
from shared.text.framing import encode

TEXTS = ("def grüße(x):\n    return x", "日本語 and 🙂 emoji", "plain words, no more")


@pytest.fixture(scope="module")
def tokenizer(tiny_pair):
    return AutoTokenizer.from_pretrained(tiny_pair.student)


def rows_of(tokenizer, documents: list[Document], *, per_row: int) -> Rows:
    """Encoded documents, so many to a row."""
    encoded = list(encode(iter(documents), tokenizer=tokenizer, loss_on="responses"))
    groups = [encoded[first : first + per_row] for first in range(0, len(encoded), per_row)]
    masks = []
    for group in groups:
        own = [one.loss_mask.copy() for one in group]
        for mask in own:
            mask[-1] = 0
        masks.append(np.concatenate(own))
    return Rows.build(
        domains=["text"] * len(groups),
        indices=range(len(groups)),
        input_ids=[np.concatenate([one.input_ids for one in group]) for group in groups],
        doc_starts=[
            np.cumsum([0, *(len(one.input_ids) for one in group[:-1])]) for group in groups
        ],
        loss_masks=masks,
    )


@pytest.mark.parametrize("per_row", [1, 2, 3])
def test_text_counts_its_utf8_bytes_but_for_what_nothing_predicts(tokenizer, per_row) -> None:
    documents = [Document("text", "here", text=text) for text in TEXTS]
    found_D = text_bytes(rows_of(tokenizer, documents, per_row=per_row), tokenizer)
    for text, found in zip(TEXTS, found_D, strict=True):
        (one,) = encode(
            iter([Document("text", "here", text=text)]), tokenizer=tokenizer, loss_on="responses"
        )
        first = tokenizer.decode([one.input_ids[0]], skip_special_tokens=True)
        assert text.startswith(first)
        assert found == len(text.encode()) - len(first.encode())


def test_a_response_counts_alone(tokenizer) -> None:
    pair = Document("pair", "here", prompt="Say ü.", response=" üben, 日本")
    (found,) = text_bytes(rows_of(tokenizer, [pair], per_row=1), tokenizer)
    assert found == len(pair.response.encode())


def test_a_document_without_loss_has_none(tokenizer) -> None:
    rows = rows_of(tokenizer, [Document("text", "here", text=TEXTS[0])], per_row=1)
    (ids,), (starts,) = rows.column("input_ids"), rows.column("doc_starts")
    silent = Rows.build(
        domains=["text"],
        indices=[0],
        input_ids=[ids],
        doc_starts=[starts],
        loss_masks=[np.zeros(len(ids))],
    )
    assert text_bytes(silent, tokenizer).tolist() == [0]

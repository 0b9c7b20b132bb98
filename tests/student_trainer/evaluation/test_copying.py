"""A copy of a text with marks is that text, whatever a model would rather write."""

import random
import re
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from shared.across.token_bytes import token_bytes
from student_trainer.evaluation.copying import CLOSE, OPEN, Copying, State, Vocabulary

TEXTS = ("Ann met Ann of New York, Inc.", "a<b << c >d> ", "né 東京 is on  fire", "one")


@pytest.fixture(scope="module")
def texts(tiny_pair) -> tuple[bytes | None, ...]:
    """The bytes of the tokens of a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.student)
    return token_bytes(tokenizer, model="").texts


def copies_of(text: str) -> set[bytes]:
    """Every copy, by another way: with and without marks about every run of words."""
    words = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]

    def rest(word: int, at: int) -> set[bytes]:
        found = {text[at:].encode()}
        for first in range(word, len(words)):
            for last in range(first, len(words)):
                (start, _), (_, end) = words[first], words[last]
                before = text[at:start].encode() + OPEN + text[start:end].encode() + CLOSE
                found |= {before + after for after in rest(last + 1, end)}
        return found

    return rest(0, 0)


@pytest.mark.parametrize("text", ["Ann of York", "a<b <c", "né 東"])
def test_what_may_follow_is_what_some_copy_goes_on_with(texts, text):
    whole = copies_of(text)
    begun = {copy[:size] for copy in whole for size in range(len(copy) + 1)}
    copying, vocabulary, draw = Copying.of(text.encode()), Vocabulary.of(texts), random.Random(3)
    for _ in range(20):
        written, states = b"", [State()]
        while copying.whole(states) is None:
            allowed = vocabulary.allowed(copying, states)
            expected = [n for n, part in enumerate(texts) if part and written + part in begun]
            assert sorted(set(allowed)) == expected
            token = texts[draw.choice(allowed)] or b""
            written, states = written + token, copying.after(states, token)
        assert written in whole


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_ever_written_that_is_not_in_the_text(texts, text):
    copying, vocabulary, draw = Copying.of(text.encode()), Vocabulary.of(texts), random.Random(5)
    seen = set()
    for _ in range(30):
        written, states = b"", [State()]
        while (done := copying.whole(states)) is None:
            token = texts[draw.choice(vocabulary.allowed(copying, states))] or b""
            written, states = written + token, copying.after(states, token)
        assert written.replace(OPEN, b"").replace(CLOSE, b"") == text.encode()
        assert all(a < b for a, b in done.spans)
        assert all(before[1] <= after[0] for before, after in pairwise(done.spans))
        marked = [part.split(CLOSE)[0] for part in written.split(OPEN)[1:]]
        assert marked == [text.encode()[a:b] for a, b in done.spans]
        seen |= set(done.spans)
    assert seen

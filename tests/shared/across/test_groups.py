"""Tokens of two vocabularies in groups that their text begins with."""

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from cluster.builtin.models import train_tokenizer
from shared.across.groups import Reader, first_tokens, in_groups
from shared.across.token_bytes import TokenBytes, token_bytes
from shared.across.token_pair import ABSENT, TokenPair, pair_tokens
from tests.shared.across.own import byte_level, sentence_piece


def reader(own: Any) -> Reader:
    return Reader(token_bytes(own, model="m"), own)


def grouped(student: Any, teacher: Any, *, rows: int | None = None) -> TokenPair:
    own, others = reader(student), reader(teacher)
    sizes = {"student_rows": rows or len(own.tokens), "teacher_rows": len(others.tokens)}
    pair = pair_tokens(own.tokens, others.tokens, **sizes)
    return in_groups(pair, own, others, student_rows=sizes["student_rows"])


@cache
def longer() -> Any:
    return train_tokenizer([inspect.getsource(inspect)], vocab=512)


@cache
def shorter() -> Any:
    return train_tokenizer([inspect.getsource(inspect)], vocab=300)


def test_a_token_goes_with_the_longest_that_both_have_and_the_other_begins_it_with() -> None:
    student, teacher = byte_level(), sentence_piece()
    pair = grouped(student, teacher)
    ids, theirs = student.convert_tokens_to_ids, teacher.convert_tokens_to_ids
    assert pair.group_V is not None
    named = {token: pair.group_V[ids(token)] for token in ("ab", "Ġ", "Ġc", "\n\n", "Ċ", "a")}
    assert named == {
        "ab": ids("ab"),
        "Ġ": ids("Ġ"),
        "Ġc": ids("Ġ"),  # the teacher writes `▁`, `c`
        "\n\n": ids("Ċ"),  # and two bytes
        "Ċ": ids("Ċ"),
        "a": ids("a"),
    }
    of_teacher = {t: pair.student_of_W[theirs(t)] for t in ("▁", "▁ab", "▁a", "ab", "<0x61>")}
    assert of_teacher == {
        "▁": ids("Ġ"),
        "▁ab": ids("Ġ"),  # the student writes `Ġ`, `ab`
        "▁a": ids("Ġ"),
        "ab": ids("ab"),
        "<0x61>": ids("a"),
    }
    assert pair.student_of_W[theirs("<unk>")] == ABSENT


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (byte_level, sentence_piece),
        (sentence_piece, byte_level),
        (longer, shorter),
        (shorter, longer),
    ],
)
def test_a_group_is_a_token_of_both_that_is_in_it_and_that_all_of_it_begin_with(
    student: Callable[[], Any], teacher: Callable[[], Any]
) -> None:
    pair, own, others = grouped(student(), teacher()), reader(student()), reader(teacher())
    assert pair.group_V is not None
    for name in np.unique(pair.student_of_W[pair.student_of_W != ABSENT]):
        assert pair.group_V[name] == name
        text = own.tokens.texts[name]
        if text is None:  # an end
            continue
        whole = [own.tokens.texts[i] for i in np.flatnonzero(pair.group_V == name)]
        theirs = [others.tokens.texts[i] for i in np.flatnonzero(pair.student_of_W == name)]
        assert text in whole
        assert text in theirs
        assert all(t is not None and t.startswith(text) for t in (*whole, *theirs))


def test_with_one_tokenizer_every_token_is_a_group_and_so_are_those_beyond_it() -> None:
    for own in (sentence_piece(), byte_level(), shorter()):
        pair = grouped(own, own, rows=2000)
        assert pair.group_V is not None
        assert pair.group_V.tolist() == list(range(2000))


def test_a_part_of_a_character_goes_with_its_first_byte_and_so_does_the_whole() -> None:
    student = train_tokenizer(["\u2019\u201c\u201d" * 9], vocab=270)
    pair, own = grouped(student, sentence_piece()), reader(student).tokens
    assert pair.group_V is not None
    named = {text: own.texts[pair.group_V[index]] for index, text in enumerate(own.texts) if text}
    parts = [text for text in named if text.startswith(b"\xe2")]
    assert len(parts) > 1
    assert all(named[text] == b"\xe2" for text in parts)


def test_a_token_that_the_other_changes_or_does_not_know_is_of_no_group_of_its_text() -> None:
    """As under NFKC, by which a half begins with 1, or where it is the unknown token of both."""
    half = byte_level()
    half.add_tokens(["\u00bd"])
    changes = byte_level()
    changes.backend_tokenizer.normalizer = normalizers.NFKC()
    first = first_tokens(reader(half).tokens, reader(changes))
    assert first[half.convert_tokens_to_ids("\u00bd")] == ABSENT
    few = Tokenizer(models.BPE({"<unk>": 0, "\n": 1}, [], unk_token="<unk>"))
    known = TokenBytes((None, b"\n"), {0: "<unk>"}, frozenset(), None, None, 0, adds_space=False)
    encoder = PreTrainedTokenizerFast(tokenizer_object=few, unk_token="<unk>")
    first = first_tokens(reader(half).tokens, Reader(known, encoder))
    assert first[half.convert_tokens_to_ids("\u00bd")] == ABSENT


def test_the_next_tokens_of_a_text_are_of_one_group() -> None:
    """Wherever both begin one after the same bytes; hardly any text is an exception."""
    own, others = longer(), shorter()
    pair, sides = grouped(own, others), (reader(own), reader(others))
    text = inspect.getsource(inspect.getdoc)
    ids, theirs = own(text)["input_ids"], others(text)["input_ids"]
    ends, their_ends = (
        np.cumsum([0, *(len(side.tokens.texts[i] or b"") for i in one)])
        for side, one in zip(sides, (ids, theirs), strict=True)
    )
    assert pair.group_V is not None
    _, at, where = np.intersect1d(ends[:-1], their_ends[:-1], return_indices=True)
    next_of_both = [(ids[n], theirs[m]) for n, m in zip(at, where, strict=True)]
    alike = [pair.group_V[n] == pair.student_of_W[m] for n, m in next_of_both]
    same = [sides[0].tokens.texts[n] == sides[1].tokens.texts[m] for n, m in next_of_both]
    assert np.mean(alike) > 0.98 > np.mean(same)


def test_what_is_no_whole_text_has_no_first_token() -> None:
    student, teacher = byte_level(), sentence_piece()
    first = first_tokens(reader(student).tokens, reader(teacher))
    ids = student.convert_tokens_to_ids
    assert first[ids("<|end|>")] == ABSENT
    assert first[ids("Ã")] == ABSENT  # half of a character
    assert first[ids("Ġc")] == teacher.convert_tokens_to_ids("▁")


def test_groups_come_back_from_a_file(tmp_path: Path) -> None:
    pair = grouped(byte_level(), sentence_piece())
    pair.write(tmp_path / "pair.npz")
    found = TokenPair.read(tmp_path / "pair.npz")
    assert pair.group_V is not None
    assert np.array_equal(found.group_V, pair.group_V)
    assert np.array_equal(found.student_of_W, pair.student_of_W)
    assert found.overlap == pair.overlap

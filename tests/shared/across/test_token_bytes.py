"""The bytes of a tokenizer's tokens, and which of two are the same."""

import numpy as np
import pytest

from shared.across.token_bytes import token_bytes
from shared.across.token_pair import ABSENT, TokenPair, pair_tokens
from shared.errors import HandshakeError
from tests.shared.across.own import byte_level, sentence_piece, word_piece


def test_tokens_of_sentence_piece_are_their_bytes() -> None:
    own = sentence_piece()
    found = token_bytes(own, model="m")
    texts = {
        token: found.texts[own.convert_tokens_to_ids(token)]
        for token in ("▁", "ab", "▁ab", "<0x0A>", "<0xC3>")
    }
    expected = {"▁": b" ", "ab": b"ab", "▁ab": b" ab", "<0x0A>": b"\n", "<0xC3>": b"\xc3"}
    assert texts == expected
    assert found.specials == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert (found.bos, found.eos, found.adds_space) == (1, 2, True)
    assert len(found.single) == 256


def test_tokens_of_bytes_are_their_bytes() -> None:
    own = byte_level()
    found = token_bytes(own, model="m")
    texts = {
        token: found.texts[own.convert_tokens_to_ids(token)]
        for token in ("Ġ", "ab", "Ġc", "Ċ", "Ã", "\n\n")
    }
    assert texts == {"Ġ": b" ", "ab": b"ab", "Ġc": b" c", "Ċ": b"\n", "Ã": b"\xc3", "\n\n": b"\n\n"}
    assert (found.bos, found.eos, found.adds_space) == (0, 1, False)


@pytest.mark.parametrize("make", [sentence_piece, byte_level])
@pytest.mark.parametrize("text", ["ab c", "  a\n\nb", "é🙂 x", "1,2!"])
def test_the_bytes_of_its_tokens_are_a_texts_after_the_space_that_it_adds(make, text) -> None:
    own = make()
    found = token_bytes(own, model="m")
    parts = [found.texts[i] for i in own(text, add_special_tokens=False)["input_ids"]]
    assert b"".join(parts) == b" " * found.adds_space + text.encode()


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(HandshakeError, match=r"tokens of teacher m are not the bytes .* take a"):
        token_bytes(word_piece(), model="teacher m")


def test_tokens_of_the_same_bytes_are_paired_and_both_ends_with_each_other() -> None:
    student, teacher = byte_level(), sentence_piece()
    own, others = token_bytes(student, model="s"), token_bytes(teacher, model="t")
    pair = pair_tokens(own, others, student_rows=len(own), teacher_rows=len(others))
    named = {
        token: pair.student_of_W[teacher.convert_tokens_to_ids(token)]
        for token in ("▁", "a", "ab", "▁ab", "<0x0A>", "<0x61>", "<s>", "</s>", "<unk>")
    }
    ids = student.convert_tokens_to_ids
    assert named == {
        "▁": ids("Ġ"),
        "a": ids("a"),
        "ab": ids("ab"),
        "▁ab": ABSENT,
        "<0x0A>": ids("Ċ"),  # which has no token of text
        "<0x61>": ABSENT,  # `a` is paired with the token of text
        "<s>": ids("<|begin|>"),
        "</s>": ids("<|end|>"),
        "<unk>": ABSENT,
    }


@pytest.mark.parametrize("make", [sentence_piece, byte_level])
def test_a_tokenizer_beside_itself_pairs_every_token_with_itself(make) -> None:
    own = token_bytes(make(), model="m")
    pair = pair_tokens(own, own, student_rows=len(own), teacher_rows=len(own))
    assert pair.student_of_W.tolist() == list(range(len(own)))


def test_tokens_beyond_an_embedding_are_paired_with_none() -> None:
    own = token_bytes(byte_level(), model="m")
    pair = pair_tokens(own, own, student_rows=100, teacher_rows=120)
    assert pair.student_of_W.tolist() == [*range(100), *[ABSENT] * 20]


def test_a_pair_is_read_as_it_was_written(tmp_path) -> None:
    own, others = (token_bytes(make(), model="m") for make in (byte_level, sentence_piece))
    pair = pair_tokens(own, others, student_rows=len(own), teacher_rows=len(others))
    pair.write(tmp_path / "pair.npz")
    found = TokenPair.read(tmp_path / "pair.npz")
    assert np.array_equal(found.student_of_W, pair.student_of_W)
    assert found.adds_space == pair.adds_space
    for one, two in ((found.student, pair.student), (found.teacher, pair.teacher)):
        assert np.array_equal(one.width_V, two.width_V)
        assert np.array_equal(one.spaced_V, two.spaced_V)
        assert one.bos == two.bos

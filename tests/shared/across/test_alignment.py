"""Spans of two tokenizations of one text, by hand, and the teacher's rows that they are of."""

from pathlib import Path

import numpy as np
import pytest

from shared.across.alignment import align
from shared.across.token_bytes import token_bytes
from shared.across.token_pair import pair_tokens
from shared.across.translating import Translator
from shared.data.row_store import RaggedRows, RowStore, write_rows
from student_trainer.tasks.token_pairing import in_shares
from tests.shared.across.own import byte_level, sentence_piece


def rows_of(path: Path, documents: list[tuple[list[int], list[int]]]) -> RowStore:
    """One row of documents: ids and loss masks."""
    ids = [np.array(one) for one, _ in documents]
    masks = [np.array(mask, np.uint8) for _, mask in documents]
    starts = np.cumsum([0, *(len(one) for one in ids[:-1])])
    rows = RaggedRows([np.concatenate(ids)], [starts], [np.concatenate(masks)])
    write_rows(path, domain="d", rows=rows)
    return RowStore.open(path)


def framed(own, text: str, *, prompt: int = 0) -> tuple[list[int], list[int]]:
    """A text between its ends; the first `prompt` positions are not learnt."""
    inner = own(text, add_special_tokens=False)["input_ids"]
    ids = [own.bos_token_id, *inner, own.eos_token_id]
    return ids, [0] * prompt + [1] * (len(ids) - 1 - prompt) + [0]


class Case:
    """A student's document, translated and aligned."""

    def __init__(self, tmp_path: Path, student, teacher, *documents) -> None:
        own, others = token_bytes(student, model="s"), token_bytes(teacher, model="t")
        pair = pair_tokens(own, others, student_rows=len(own), teacher_rows=len(others))
        store = rows_of(tmp_path / "student.arrow", list(documents))
        self.translated = Translator(own, others, pair, teacher).translated(store)
        write_rows(tmp_path / "teacher.arrow", domain="d", rows=self.translated.rows)
        theirs = RowStore.open(tmp_path / "teacher.arrow").take([0])
        self.ids = theirs.column("input_ids")[0].tolist()
        self.mask = theirs.column("loss_mask")[0].tolist()
        self.tokens = teacher.convert_ids_to_tokens(self.ids)
        self.found = align(store.take([0]), theirs, pair)


def test_a_teacher_of_sentence_piece_reads_a_text_of_bytes(tmp_path) -> None:
    student = byte_level()
    case = Case(tmp_path, student, sentence_piece(), framed(student, "ab c"))
    # student: ab | Ġc | end        teacher: ▁ab | ▁ c | end
    assert case.tokens == ["<s>", "▁ab", "▁", "c", "</s>"]
    assert case.mask == [1, 1, 1, 1, 0]
    found = case.found
    assert found.span_N.tolist() == [0, 1, 2]
    assert found.span_M.tolist() == [0, 1, 1, 2]
    assert found.is_whole_S.tolist() == [True, True, True]
    assert found.is_shifted_S.tolist() == [True, False, False]  # one space more before the text
    assert found.is_merged_S.tolist() == [True, True, False]


def test_a_teacher_of_bytes_reads_a_text_of_sentence_piece(tmp_path) -> None:
    student = sentence_piece()
    case = Case(tmp_path, student, byte_level(), framed(student, "ab é\n\na"))
    # student: ▁ab | ▁ | C3 | A9 | 0A 0A | a | end   teacher: ab | Ġ | Ã | © | \n\n | a | end
    assert case.tokens == ["<|begin|>", "ab", "Ġ", "Ã", "©", "\n\n", "a", "<|end|>"]
    found = case.found
    assert found.span_N.tolist() == [0, 1, 2, 3, 4, 4, 5, 6]
    assert found.span_M.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(found.is_merged_S).tolist() == [0, 4]


def test_a_span_of_which_a_part_is_not_learnt_is_not_whole(tmp_path) -> None:
    student = byte_level()
    ids = [0, *(student.convert_tokens_to_ids(t) for t in "ab")]  # `a`, `b` apart, as if cut there
    case = Case(tmp_path, student, sentence_piece(), (ids, [0, 1, 0]))
    assert case.tokens == ["<s>", "▁ab"]
    assert case.mask == [1, 0]  # it holds a byte that is learnt
    assert case.found.span_N.tolist() == [0]
    assert case.found.is_whole_S.tolist() == [False]


def test_a_teachers_positions_are_learnt_where_the_students_bytes_are(tmp_path) -> None:
    student = sentence_piece()
    case = Case(tmp_path, student, byte_level(), framed(student, "ab c", prompt=1))
    assert case.tokens == ["<|begin|>", "ab", "Ġc", "<|end|>"]
    assert case.mask == [0, 1, 1, 0]
    assert case.found.span_N.tolist() == [1, 1, 2]
    assert case.found.is_whole_S.tolist() == [False, True, True]


def test_without_ends_of_its_own_a_teacher_reads_the_text_alone(tmp_path) -> None:
    student = sentence_piece()
    case = Case(tmp_path, student, byte_level(with_ends=False), framed(student, "ab c"))
    assert case.tokens == ["ab", "Ġc"]
    assert case.mask == [1, 0]
    assert case.found.is_whole_S.tolist() == [False, True]  # nothing predicts its first token
    assert case.found.span_N.tolist() == [0, 1, 1, -1]  # nor does anything of its the end


def test_a_space_that_is_a_token_of_its_own_goes_with_the_first_word(tmp_path) -> None:
    student = sentence_piece()
    case = Case(tmp_path, student, byte_level(), framed(student, "1"))
    # student: ▁ 1 | end        teacher: 1 | end
    assert case.tokens == ["<|begin|>", "1", "<|end|>"]
    assert case.found.span_N.tolist() == [0, 0, 1]
    assert case.found.span_M.tolist() == [0, 1]
    assert case.found.is_merged_S.tolist() == [True, False]
    back = byte_level()
    case = Case(tmp_path, back, sentence_piece(), framed(back, "1"))
    assert case.found.span_N.tolist() == [0, 1]
    assert case.found.span_M.tolist() == [0, 0, 1]
    assert case.mask == [1, 1, 1, 0]


def test_characters_that_are_a_special_token_of_the_teacher_alone_are_left_out(tmp_path) -> None:
    student = sentence_piece()
    case = Case(tmp_path, student, byte_level(), framed(student, "x<|begin|>y"))
    assert "<|begin|>" in case.tokens[1:]
    assert case.translated.left_out == 1


def test_a_text_with_an_unknown_token_is_left_out(tmp_path) -> None:
    case = Case(tmp_path, sentence_piece(), byte_level(), ([1, 0, 2], [1, 1, 0]))
    assert case.translated.left_out == 1


def test_where_a_teacher_says_nothing_the_mean_of_its_nats_stands(tmp_path) -> None:
    student = sentence_piece()
    found = Case(tmp_path, student, byte_level(with_ends=False), framed(student, "ab c")).found
    nats_S = np.array([0.0, -3.0])  # of ab, which it does not predict, and Ġc
    assert in_shares(found, nats_S).tolist() == [-1.5, -1.5, -1.5, -1.5]


@pytest.mark.parametrize("text", ["x<s>y", "</s>"])
def test_a_text_that_the_teacher_reads_otherwise_is_left_out_and_counted(tmp_path, text) -> None:
    student = byte_level()
    documents = [framed(student, text), framed(student, "ab")]
    case = Case(tmp_path, student, sentence_piece(), *documents)
    assert (case.translated.documents, case.translated.left_out) == (2, 1)
    assert sum(case.mask) == 2
    assert case.found.span_N.tolist() == [*[-1] * (len(documents[0][0]) - 1), 0, 1]


def test_a_piece_that_ends_within_a_character_is_left_out(tmp_path) -> None:
    student = byte_level()
    ids, _ = framed(student, "é")
    case = Case(tmp_path, student, sentence_piece(), (ids[:2], [1, 0]), framed(student, "ab"))
    assert case.translated.left_out == 1


@pytest.mark.parametrize("text", ["ab", "1"])
@pytest.mark.parametrize("make", [sentence_piece, byte_level])
def test_with_one_tokenizer_every_span_is_a_token_of_both(tmp_path, make, text) -> None:
    own = make()
    ids, mask = framed(own, f"{text} c\n\nx é", prompt=1)
    case = Case(tmp_path, own, own, (ids, mask))
    assert case.ids == ids
    assert case.mask == mask
    assert np.array_equal(case.found.span_N, case.found.span_M)
    assert (case.found.span_N >= 0).all()
    assert not case.found.is_merged_S.any()
    assert not case.found.is_shifted_S.any()

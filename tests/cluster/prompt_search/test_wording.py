"""Other words for an instruction, and the choice of examples."""

import numpy as np
import pytest

from cluster.prompt_search import wording
from cluster.prompt_search.examples import Relevance, vectors

INSTRUCTION = "Write the first word of the line, then stop."


def test_content_words_come_once_and_in_order():
    assert wording.content_words("Pick the word, the first Word or word.") == [
        "Pick", "word", "first", "Word",
    ]  # fmt: skip


def test_a_word_left_out_leaves_a_tidy_sentence():
    assert wording.without(INSTRUCTION, "line") == "Write the first word of the, then stop."
    assert wording.without("first firsthand first", "first") == "firsthand"


def test_near_words_keep_the_case_and_never_are_the_word_itself():
    assert "last" in wording.near_words("first")
    assert "Give" in wording.near_words("Write")
    assert "first" not in wording.near_words("first")
    assert wording.near_words("aardvark") == []


@pytest.mark.parametrize(
    ("rewrite", "passes"),
    [
        ("Name the word that opens the line.", True),
        (INSTRUCTION, False),
        (INSTRUCTION.upper(), False),
        ("", False),
        ("stop", False),
        ("word word word word word word word", False),
        ("x y" * 200, False),
        ("Say the opening\nword and stop", False),
    ],
)
def test_paraphrases_pass_where_they_are_other_texts(rewrite, passes):
    assert wording.acceptable(rewrite, INSTRUCTION) is passes


def test_distances_are_shares():
    assert wording.edit_distance("same", "same") == 0
    assert wording.word_distance("a b", "b a") == 0
    assert wording.word_distance("a b", "c d") == 1
    assert 0 < wording.edit_distance("first word", "last word") < 1


def test_rules_make_different_texts_that_keep_the_words():
    made = wording.rewrites("If the line is long, write the first word.")
    assert made["question"] == "Can you if the line is long, write the first word?"
    assert made["order"] == "Write the first word if the line is long."
    assert wording.rewrites("Read it. Say it.")["order"] == "Say it. Read it."
    assert len(set(made.values())) == len(made)


def choose(pool, questions, *, count, trade_off):
    among = range(len(pool))
    return Relevance(pool, questions).choose(among, count=count, trade_off=trade_off)


def test_vectors_are_of_length_one_or_nought():
    norms = np.linalg.norm(vectors(["two words", "", "two words"]), axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1])


def test_the_most_relevant_comes_first_and_a_copy_of_it_last():
    pool = ["cats eat fish", "cats eat fish", "dogs eat meat", "stones lie still"]
    questions = ["what do cats eat", "do cats like fish", "do dogs eat"]
    assert choose(pool, questions, count=4, trade_off=0.5) == [0, 2, 3, 1]


def test_relevance_alone_takes_copies_and_novelty_alone_avoids_them():
    pool = ["cats eat fish", "cats eat fish", "stones lie still"]
    assert choose(pool, ["cats eat fish"], count=2, trade_off=1.0) == [0, 1]
    assert choose(pool, ["cats eat fish"], count=2, trade_off=0.0) == [0, 2]


def test_no_more_are_chosen_than_there_are():
    assert sorted(choose(["a word", "b word"], ["word"], count=5, trade_off=0.5)) == [0, 1]


def test_only_what_is_offered_is_chosen():
    relevance = Relevance(["cats eat fish", "cats eat meat", "stones"], ["cats eat fish"])
    assert relevance.choose([1, 2], count=2, trade_off=0.9) == [1, 2]

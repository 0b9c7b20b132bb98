"""Scores of written answers, against values worked out by hand."""

import pytest

from cluster.evaluation import scores as module
from cluster.evaluation.scores import has_rouge, scores


@pytest.mark.parametrize(
    ("written", "right", "exact", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0, 1.0),
        ("a cat", "the dog", 0.0, 0.0),
        ("in Paris, France", "Paris", 0.0, 0.5),
        ("Paris Paris", "Paris", 0.0, 2 / 3),
        ("one two three", "three two one", 0.0, 1.0),
        ("", "", 1.0, 1.0),
        ("something", "", 0.0, 0.0),
        ("the", "an", 1.0, 1.0),
    ],
)
def test_words_are_compared_as_in_squad(written, right, exact, f1) -> None:
    found = scores(written, right)
    assert found.exact_match == exact
    assert found.token_f1 == pytest.approx(f1)


@pytest.mark.skipif(not has_rouge(), reason="the extra `eval` is not installed")
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # a common subsequence of 3 words: of 4 written, of 6 right
    found = scores("police killed the gunman", "police kill the gunman at once").rouge_l
    assert found == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert scores("running", "run").rouge_l == 0  # words are not stemmed


def test_without_the_package_the_other_scores_are_there(monkeypatch) -> None:
    monkeypatch.setattr(module, "ROUGE", "no_such_package_of_rouge")
    found = scores("Paris", "Paris")
    assert (found.exact_match, found.token_f1, found.rouge_l) == (1.0, 1.0, None)

"""Rows in what a teacher writes, and why some are left out."""

import json

import pytest

from cluster.active.filtering import Row, Sieve, rows_in, same

GOOD = {"prompt": "a rose", "response": "red"}


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(GOOD),
        json.dumps([GOOD]),
        f"Sure! Here it is:\n```json\n{json.dumps([GOOD], indent=2)}\n```\nAnything else?",
        json.dumps(GOOD) + '\n{"prompt": "cut here',
        json.dumps([GOOD])[:-1] + ', {"prompt": "cut',
        json.dumps({"prompt": "  a rose ", "response": "red\n", "why": "it is"}),
        '{"prompt": "no response"}\n' + json.dumps(GOOD),
        '{"prompt": 3, "response": "red"} [1, "x", null] ' + json.dumps(GOOD),
        '{"prompt": "half \\ud800", "response": "red"}' + json.dumps(GOOD),
        '{"prompt": "broken \ufffd", "response": "red"}' + json.dumps(GOOD),
    ],
)
def test_rows_are_found_in_an_answer_whatever_is_around_them(answer):
    assert rows_in(answer) == [Row("a rose", "red")]


@pytest.mark.parametrize("answer", ["", "none", "{", "[" * 5000, "{" * 5000, '{"a": {}}', "[]"])
def test_an_answer_without_rows_has_none(answer):
    assert rows_in(answer) == []


def test_a_row_is_kept_once_and_every_other_has_its_reason():
    sieve = Sieve(
        training=frozenset({same("Known one.")}),
        validation=frozenset({same("held  out?")}),
        classes=frozenset({"red"}),
        written={same("earlier")},
    )
    reasons = {
        Row("", "red"): "empty",
        Row(" ? ", "red"): "empty",
        Row("a", ""): "empty",
        Row("a", "mauve"): "unknown class",
        Row("KNOWN one", "red"): "in training",
        Row("Held out", "red"): "in validation",
        Row("Earlier!", "red"): "written before",
    }
    assert {row: sieve.reason(row, fits=True) for row in reasons} == reasons
    assert sieve.reason(Row("new", "red"), fits=False) == "too long"
    assert sieve.reason(Row("new", "red"), fits=True) is None
    assert sieve.reason(Row("New.", "red"), fits=True) == "written before"

"""Rows of a text and one type of entities, and the text with those marked."""

import json
from pathlib import Path

import pytest

from shared.config.domains import Domain
from shared.errors import DataError
from shared.prompts.marking import MarkFraming, marked
from shared.text.tagged import Span


def read(folder: Path, rows: list[dict], **options) -> list[tuple[str, str]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    framing = MarkFraming(("who", "place"), "{type}? {text}", "responses", "auto", **options)
    found = framing.read(Domain(train=str(path)), "train", root=folder)
    return [(one.prompt, one.response) for one in found]


ROW = {
    "text": " Ann of New York met Bo ",
    "entities": [
        {"start": 1, "end": 4, "type": "who"},
        {"start": 8, "end": 16, "type": "place"},
        {"start": 21, "end": 23, "type": "who"},
    ],
}


def test_every_type_is_a_row_of_its_own_in_which_all_of_it_is_marked(tmp_path):
    assert read(tmp_path, [ROW, {"text": "No one", "entities": []}]) == [
        ("who? Ann of New York met Bo", "<<< Ann >>> of New York met <<< Bo >>>"),
        ("place? Ann of New York met Bo", "Ann of <<< New York >>> met Bo"),
        ("who? No one", "No one"),
        ("place? No one", "No one"),
    ]


def test_an_episode_has_few_rows_of_all_types(tmp_path):
    rows = [ROW | {"text": f" Ann of New York met Bo {n}"} for n in range(9)]
    both = [read(tmp_path, rows, shots=2, episode=episode) for episode in (0, 1)]
    assert [len(found) for found in both] == [4, 4]
    assert read(tmp_path, rows, shots=2, episode=0) == both[0] != both[1]


@pytest.mark.parametrize("mark", ["<<<", ">>>"])
def test_a_text_with_a_mark_in_it_is_refused_with_its_row(tmp_path, mark):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: its text has {mark} in it, .*; "):
        read(tmp_path, [{"text": f"a {mark} b", "entities": []}])


def test_marks_stand_about_spans_wherever_these_are():
    assert marked("a b c", [Span(4, 5), Span(0, 1)]) == "<<< a >>> b <<< c >>>"

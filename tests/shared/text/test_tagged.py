"""Rows of a text and its entities: what is read, what is refused, and what an episode draws."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.config.domains import Domain
from shared.config.tasks.task import tags_of
from shared.errors import DataError
from shared.text.tagged import (
    WORD,
    Span,
    TagFraming,
    drawn,
    read_episode,
    spans_of,
    tagged_of,
)

TEXT = "Ann met Ann of New York, Inc."
LABELS = tuple(tags_of(["place", "who"]))


def read(entities: Any, text: str = TEXT) -> list[Span]:
    return spans_of(tagged_of({"text": text, "entities": entities}, "rows:3", {}))


@pytest.fixture(scope="module")
def tokenizer(tiny_pair) -> Any:
    return AutoTokenizer.from_pretrained(tiny_pair.teacher)


def encoded(row: dict[str, Any], tokenizer: Any, **options: Any) -> Any:
    framing = TagFraming(options.pop("labels", LABELS))
    asked = {"tokenizer": tokenizer, "context": 64, "cut": None} | options
    return next(framing.encode([tagged_of(row, "rows:3", {})], **asked))


def test_offsets_texts_and_json_of_either_tell_the_same_entities():
    by_offset = [{"start": 15, "end": 23, "type": "place"}, {"start": 8, "end": 11, "type": "who"}]
    assert read(by_offset) == [Span(8, 11, "who"), Span(15, 23, "place")]
    assert read(json.dumps(by_offset)) == read(by_offset)
    by_text = [{"text": "Ann", "type": "who"}, {"text": "New York", "type": "place"}]
    assert read(by_text) == [Span(0, 3, "who"), Span(15, 23, "place")]
    pair = {"prompt": TEXT, "response": json.dumps(by_text)}
    assert spans_of(tagged_of(pair, "rows:3", {})) == read(by_text)


def test_a_text_that_is_told_twice_is_at_its_two_places():
    ann = {"text": "Ann", "type": "who"}
    assert read([ann, ann]) == [Span(0, 3, "who"), Span(8, 11, "who")]


def test_an_entity_is_found_as_whole_words_alone():
    assert read([{"text": "AS", "type": "who"}], "He WAS of AS") == [Span(10, 12, "who")]


@pytest.mark.parametrize(
    ("entity", "said"),
    [
        ({"start": 24, "end": 99, "type": "who"}, "from 24 to 99, but the text has 29 characters"),
        ({"start": -1, "end": 3, "type": "who"}, "from -1 to 3, but the text has 29 characters"),
        ({"start": 3, "end": 3, "type": "who"}, "from 3 to 3"),
        ({"start": 16, "end": 23, "type": "who"}, "'ew York' begins or ends within a word"),
        ({"start": 19, "end": 23, "type": "who"}, "'York' overlaps another"),
        ({"text": "Bob", "type": "who"}, "'Bob' of type who is not in the text as whole words"),
        ({"text": "York", "type": "who"}, "'York' of type who overlaps others"),
        ({"text": "Ann"}, "names no type"),
        (
            {"start": 0.0, "end": 3.0, "type": "who"},
            "from 0.0 to 3.0; write start and end as whole",
        ),
        ({"start": 0, "type": "who"}, "from 0 to None; write start and end as whole"),
        ("Ann", "names no type"),
        ({"start": 0, "end": 3, "type": "B-who"}, "has a tag for its type"),
        ({"start": 0, "end": 3, "type": "O"}, "has a tag for its type"),
        ({"start": 0, "end": 3, "type": "wh\ud800"}, "a type holds half a surrogate pair"),
        ({"start": 0, "end": 3, "text": "met", "type": "who"}, "'met' is 'Ann' from 0 to 3"),
    ],
)
def test_entities_that_are_not_there_are_refused_with_their_row(entity, said):
    with pytest.raises(DataError, match=r"^rows:3: .*; ") as error:
        read([{"start": 15, "end": 23, "type": "place"}, entity])
    assert said in str(error.value)


def test_entities_that_are_no_list_are_refused():
    for told in ("Ann", {"Ann": "who"}, "{}", "[" * 100_000):
        with pytest.raises(DataError, match=r"rows:3: its entities are no list"):
            read(told)


def test_a_row_says_what_is_not_read_of_it():
    row = {"text": TEXT, "entities": [], "input": "more", "id": None}
    assert tagged_of(row, "rows:3", {}).unread == ("input", "id")
    with pytest.raises(DataError, match="rows:3: entities is null; write it"):
        tagged_of(row | {"entities": None}, "rows:3", {})


def test_each_word_is_tagged_at_its_first_token_and_others_have_no_loss(tokenizer):
    row = {"text": TEXT, "entities": [{"start": 15, "end": 23, "type": "place"}]}
    found = encoded(row, tokenizer)
    words = ["Ann", "met", "Ann", "of", "New", "York", ",", "Inc", "."]
    length = len(tokenizer(TEXT)["input_ids"])
    assert found.input_ids[:length].tolist() == tokenizer(TEXT)["input_ids"]
    tags = [LABELS[number] for number in found.input_ids[length:]]
    spans = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    begun = [TEXT[spans[at][0] :].strip() for at in found.loss_mask.nonzero()[0]]
    assert len(tags) == len(begun) == found.loss_mask.sum()
    for tag, rest in zip(tags, begun, strict=True):
        word = next(one for one in sorted(words, key=len, reverse=True) if rest.startswith(one))
        assert tag == {"New": "B-place", "York": "I-place"}.get(word, "O")


def test_a_type_that_training_rows_do_not_have_is_refused(tokenizer):
    row = {"text": TEXT, "entities": [{"text": "Inc", "type": "firm"}]}
    with pytest.raises(DataError, match=r"rows:3 has an entity of type 'firm', .*task.types"):
        encoded(row, tokenizer)


def test_a_text_that_is_too_long_loses_its_end_and_is_told(tokenizer):
    row, told = {"text": TEXT, "entities": [{"text": "Ann", "type": "who"}]}, []
    found = encoded(row, tokenizer, context=12, cut=lambda: told.append(1))
    assert len(found.input_ids) <= 12
    assert told == [1]
    assert found.loss_mask.any()


def test_letters_of_scripts_without_spaces_are_words():
    assert read([{"start": 2, "end": 4, "type": "place"}], "我爱北京天安门 ok") == [
        Span(2, 4, "place")
    ]
    assert [match.group() for match in WORD.finditer("né_1 カ京ab, ก")] == [
        *("né_1", "カ", "京", "ab", ",", "ก")
    ]


def test_a_cut_text_keeps_all_that_fits_with_its_tags(tokenizer):
    row = {"text": TEXT, "entities": []}
    whole = encoded(row, tokenizer)
    for context in range(6, len(whole.input_ids)):
        found = encoded(row, tokenizer, context=context, cut=lambda: None)
        words = int(found.loss_mask.sum())
        assert len(found.input_ids) <= context
        more = np.flatnonzero(whole.loss_mask)[words : words + 1]
        assert len(found.input_ids) + 2 > context or len(more) == 0 or more[0] + words > context - 2


def test_an_episode_is_drawn_of_rows_whose_text_no_validation_row_has(tmp_path):
    rows = [{"text": f"a {n}", "entities": [{"text": "a", "type": "who"}]} for n in range(6)]
    for name, part in (("train", rows), ("held", rows[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    domain = Domain(train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "held.jsonl"))
    found = read_episode(domain, "train", root=tmp_path, shots=2, seed=0)
    assert [document.prompt for document in found] == ["a 5"]


def rows_of_types() -> list[Any]:
    kinds = ["who", "who", "place", "who", "place", "", "who", "who", "rare", "who"] * 3
    rows = [{"text": f"a {n}", "entities": []} for n, _ in enumerate(kinds)]
    for row, kind in zip(rows, kinds, strict=True):
        row["entities"] = [{"start": 0, "end": 1, "type": kind}] if kind else []
    return [tagged_of(row, f"rows:{n}", {}) for n, row in enumerate(rows)]


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_an_episode_has_as_many_entities_of_each_type_as_are_asked_for_or_all(shots):
    rows = rows_of_types()
    chosen = drawn(rows, shots=shots, seed=3)
    had = Counter(span.type for row in chosen for span in spans_of(row))
    assert had == {"who": shots, "place": shots, "rare": min(shots, 3)}
    assert drawn(rows, shots=shots, seed=3) == chosen
    assert any(drawn(rows, shots=shots, seed=seed) != chosen for seed in range(4))

"""A prompt's history: pairs of earlier turns, as rows in the form of Alpaca have it."""

import json
from functools import partial
from pathlib import Path

import pytest

from shared.config.domains import Domain
from shared.errors import DataError
from shared.text.documents import Document, Message, document_of
from shared.text.preferences import read_pairs
from tests.shared.text.test_framing import CHATML, chatting, encoded, learnt_texts
from tests.shared.text.test_sources import write

EARLIER = [["What is 2+2?", "4"], ["And 3+3?", "6"]]
ROW = {"prompt": "And 4+4?", "input": "Quick!", "response": "8", "history": EARLIER}
TURNS = [
    *(("user", "What is 2+2?"), ("assistant", "4")),
    *(("user", "And 3+3?"), ("assistant", "6")),
    *(("user", "And 4+4?\n\nQuick!"), ("assistant", "8")),
]


def document(row: dict, **columns: str) -> Document:
    return document_of(row, "a:1", columns)  # type: ignore[arg-type]


def turns(found: Document) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in found.messages]


@pytest.mark.parametrize("written", [EARLIER, json.dumps(EARLIER)])
def test_a_history_is_the_turns_before_a_prompt(tokenizer, written: object) -> None:
    found = document(ROW | {"history": written})
    assert (turns(found), found.unread) == (TURNS, ())
    (one,) = encoded(chatting(tokenizer, CHATML), found)
    assert learnt_texts(tokenizer, one) == [f"{n}<|im_end|>" for n in (4, 6, 8)]


def test_a_history_keeps_system_and_tools_and_may_have_another_name() -> None:
    row = ROW | {"system": "Be brief.", "tools": [{"name": "f"}], "history": 3, "before": EARLIER}
    found = document(row, history="before")
    assert found.messages[0] == Message("system", "Be brief.")
    assert turns(found)[1:] == TURNS
    assert (found.tools, found.unread) == (({"name": "f"},), ("history",))


@pytest.mark.parametrize("nothing", [[], "[]", None, ""])
def test_a_history_without_a_turn_leaves_a_pair(nothing: object) -> None:
    found = document(ROW | {"history": nothing})
    assert (found.kind, found.response, found.unread) == ("pair", "8", ())


def test_a_history_that_is_no_list_or_stands_beside_text_is_counted() -> None:
    for other in ("of Rome", "[2010] diabetes", ["q", "a"], [{"role": "user", "content": "q"}]):
        assert document(ROW | {"history": other}).unread == ("history",)
    assert document({"text": "a", "history": EARLIER}).unread == ("history",)


@pytest.mark.parametrize("turn", ["q", ["q"], ["q", "a", "b"], {"q": "a"}])
def test_a_turn_of_a_history_that_is_no_pair_is_refused(turn: object) -> None:
    with pytest.raises(
        DataError, match=r"a:1: turn 2 of history is .* or give the conversation as"
    ):
        document(ROW | {"history": [EARLIER[0], turn]})
    with pytest.raises(DataError, match="a:1: turn 1 of history is null, not a string"):
        document(ROW | {"history": [["q", None]]})


def test_a_history_without_a_chat_template_is_refused(tokenizer) -> None:
    said = r"a:1 is a conversation .*a prompt with history.*has no chat template; give prompt and"
    with pytest.raises(DataError, match=said):
        encoded(chatting(tokenizer, ""), document(ROW))


def test_a_preference_learns_neither_of_its_histories_answers(tmp_path: Path, tokenizer) -> None:
    row = {k: v for k, v in ROW.items() if k != "response"} | {"chosen": "8", "rejected": "9"}
    write(tmp_path / "a.jsonl", row)
    read = partial(read_pairs, Domain(train="a.jsonl"), "train")
    for found, answer in zip(read(root=tmp_path), ("8", "9"), strict=True):
        assert turns(found) == [*TURNS[:-1], ("assistant", answer)]
        (one,) = encoded(chatting(tokenizer, CHATML), found)
        assert learnt_texts(tokenizer, one) == [f"{answer}<|im_end|>"]

"""Answers that say that they go on: their ends are not learnt, whatever the template."""

from dataclasses import replace

import pytest

from shared.errors import DataError
from shared.text.documents import Message
from shared.text.masks import is_unfinished
from tests.shared.text.test_chat import answer, chat, learnt, user
from tests.shared.text.test_framing import (
    CHATML,
    CONVERSATION,
    LEARNT,
    chatting,
    encoded,
    learnt_texts,
)


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("said", [{"prefix": True}, {"partial": 1}, {"end_turn": "false"}])
def test_the_end_of_an_answer_that_says_that_it_goes_on_is_not_learnt(
    tokenizer, name: str, said: dict
) -> None:
    template, whole = LEARNT[name]
    chatting(tokenizer, template)
    for at in (1, 3):
        more = [{"partial": False, "end_turn": True} for _ in CONVERSATION.messages]
        more[at] = said
        both = zip(CONVERSATION.messages, more, strict=True)
        turns = [replace(m, more=one) if m.role == "assistant" else m for m, one in both]
        (found,) = encoded(tokenizer, chat(*turns))
        expected = list(whole)
        expected[at // 2] = expected[at // 2].partition("<")[0].rstrip()
        assert [text.rstrip() for text in learnt_texts(tokenizer, found)] == expected
        assert (found.remarks.unfinished, found.remarks.unread) == (1, ())


def test_where_everything_is_learnt_the_end_of_an_answer_that_goes_on_is_not(tokenizer) -> None:
    chatting(tokenizer, CHATML)
    turns = [user("Q"), answer("a", prefix=True), user("More."), answer("b", partial=True)]
    first, second = learnt(tokenizer, *turns, loss_on="everything")
    assert first.endswith("Q<|im_end|>\n<|im_start|>assistant\na")
    assert second.endswith("More.<|im_end|>\n<|im_start|>assistant\nb")


def test_an_answer_that_goes_on_is_refused_where_its_end_cannot_be_found(tokenizer) -> None:
    chatting(tokenizer, CHATML.replace("m.content +", "m.content[:1] + m.content[1:3] +"))
    with pytest.raises(DataError, match="message 2 is not finished, as it says itself, and where"):
        learnt(tokenizer, user("Q"), answer("abcdef", prefix=True))


def test_an_answer_that_goes_on_is_another_document_and_no_empty_one(tokenizer) -> None:
    whole, part = (chat(user(), answer("", **more)) for more in ({}, {"partial": True}))
    assert whole.strings != part.strings
    assert whole.strings == chat(user(), answer("", partial=False)).strings
    (one,) = encoded(chatting(tokenizer, CHATML), part)
    assert (one.remarks.empty_answers, int(one.loss_mask.sum())) == (0, 0)


def test_what_a_user_says_of_an_end_is_not_read(tokenizer) -> None:
    turns = [Message("user", "Q", {"partial": True}), answer("a", partial="perhaps")]
    (one,) = encoded(chatting(tokenizer, CHATML), chat(*turns))
    assert (one.remarks.unread, learnt_texts(tokenizer, one)) == (("partial",), ["a<|im_end|>"])


def test_an_answer_with_a_call_ends_with_it_whoevers_turn_it_still_is() -> None:
    call = {"tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {}}}]}
    turn = {"role": "assistant", "content": "Let me look.", "end_turn": False}
    assert is_unfinished(turn)
    assert is_unfinished(turn | {"tool_calls": []})
    assert not is_unfinished(turn | call)

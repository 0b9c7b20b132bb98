"""From documents to ids, and which of them are learnt: four chat templates and plain text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.errors import DataError
from shared.text.documents import Document, Message
from shared.text.framing import Encoded, content_key, encode

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
LEARNT = {
    "chatml": (CHATML, ["4 is <|im_end|>", "It is\n 6.<|im_end|>"]),
    "llama-2": (LLAMA_2, [" 4 is <|eos|>", " It is\n 6. <|eos|>"]),
    "gemma": (GEMMA, ["4 is<end_of_turn>", "It is\n 6.<end_of_turn>"]),
    "zephyr": (ZEPHYR, ["4 is <|eos|>", "It is\n 6.<|eos|>"]),
}
CONVERSATION = Document(
    "messages",
    "a.jsonl:1",
    messages=(
        Message("user", "What is 2+2?"),
        Message("assistant", "4 is "),
        Message("user", "And 3+3? 4 is <b>"),
        Message("assistant", "It is\n 6."),
    ),
)


def chatting(tokenizer, template: str):
    """The tokenizer with the marks of the templates as special tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer, *documents: Document, loss_on: str = "responses") -> list[Encoded]:
    return list(encode(iter(documents), tokenizer=tokenizer, loss_on=loss_on))  # type: ignore


def learnt_texts(tokenizer, one: Encoded) -> list[str]:
    """What the model is trained to write, run by run: tokens whose predecessor has loss."""
    predicted = np.flatnonzero(one.loss_mask) + 1
    runs = np.split(predicted, np.flatnonzero(np.diff(predicted) > 1) + 1)
    return [tokenizer.decode(one.input_ids[run]) for run in runs]


@pytest.mark.parametrize("name", LEARNT)
def test_the_assistants_turns_and_their_ends_are_learnt_and_nothing_else(
    tokenizer, name: str
) -> None:
    template, expected = LEARNT[name]
    (one,) = encoded(chatting(tokenizer, template), CONVERSATION)
    assert learnt_texts(tokenizer, one) == expected


@pytest.mark.parametrize("name", LEARNT)
def test_ids_are_those_of_the_template_with_no_second_bos(tokenizer, name: str) -> None:
    chatting(tokenizer, LEARNT[name][0])
    (one,) = encoded(tokenizer, CONVERSATION)
    turns = [{"role": m.role, "content": m.content} for m in CONVERSATION.messages]
    own = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert one.input_ids.tolist() == own


@pytest.mark.parametrize("name", LEARNT)
def test_a_prompt_and_response_are_two_turns_where_there_is_a_template(
    tokenizer, name: str
) -> None:
    chatting(tokenizer, LEARNT[name][0])
    pair = Document("pair", "a:1", prompt="What is 2+2?", response="4 is ")
    turns = Document("messages", "a:1", messages=CONVERSATION.messages[:2])
    one, other = encoded(tokenizer, pair, turns)
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    assert learnt_texts(tokenizer, one) == LEARNT[name][1][:1]


def test_with_loss_on_everything_all_but_the_last_position_has_loss(tokenizer) -> None:
    chatting(tokenizer, CHATML)
    pair = Document("pair", "a:1", prompt="p", response="r")
    text = Document("text", "a:2", text="some text")
    for one in encoded(tokenizer, CONVERSATION, pair, text, loss_on="everything"):
        assert one.loss_mask[:-1].all()
        assert one.loss_mask[-1] == 0


def test_text_is_framed_by_bos_and_eos_and_learnt_whole(tokenizer) -> None:
    (one,) = encoded(tokenizer, Document("text", "a:1", text="def f(): return 1"))
    plain = tokenizer("def f(): return 1", add_special_tokens=False)["input_ids"]
    assert one.input_ids.tolist() == [1, *plain, 2]
    assert learnt_texts(tokenizer, one) == ["def f(): return 1<|eos|>"]


def test_a_response_is_learnt_with_its_eos_and_its_prompt_is_not(tokenizer) -> None:
    pair = Document("pair", "a:1", prompt="self.x\n", response="\n  return é")
    (one,) = encoded(tokenizer, pair)
    whole = tokenizer("self.x\n\n\n  return é", add_special_tokens=False)["input_ids"]
    assert one.input_ids.tolist() == [1, *whole, 2]
    (learnt,) = learnt_texts(tokenizer, one)
    assert learnt.endswith("\n  return é<|eos|>")
    assert "x" not in learnt


def test_a_tokenizer_that_adds_its_own_bos_does_not_get_two(reference: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference / "models" / "stories260k")
    pair = Document("pair", "a:1", prompt="Once upon", response="a time there was")
    text = Document("text", "a:2", text="Once upon a time")
    for one in encoded(tokenizer, pair, text):
        ids = one.input_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
    (one,) = encoded(tokenizer, pair)
    predicted = one.input_ids[np.flatnonzero(one.loss_mask) + 1][:-1]
    assert tokenizer.decode(predicted).strip() == "a time there was"


def test_a_conversation_without_a_template_is_refused_with_the_way_out(tokenizer) -> None:
    with pytest.raises(
        DataError, match="has no chat template; give prompt and response alone, or add"
    ):
        encoded(tokenizer, CONVERSATION)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer) -> None:
    rewriting = CHATML.replace("m.content", "('' if loop.last else '(old) ') + m.content")
    with pytest.raises(DataError, match="renders message 2, or what ends it, differently when"):
        encoded(chatting(tokenizer, rewriting), CONVERSATION)
    (one,) = encoded(tokenizer, CONVERSATION, loss_on="everything")
    assert one.loss_mask.sum() == len(one.input_ids) - 1


def test_what_the_template_refuses_is_said_with_the_row(tokenizer) -> None:
    twice = Document("messages", "b.jsonl:7", messages=CONVERSATION.messages[:1] * 2)
    with pytest.raises(DataError, match=r"b\.jsonl:7: the chat template .* \(roles must alternate"):
        encoded(chatting(tokenizer, LLAMA_2), twice)


def test_a_conversation_that_the_assistant_opens_is_refused(tokenizer) -> None:
    first = Document("messages", "b:1", messages=CONVERSATION.messages[1:])
    with pytest.raises(DataError, match="opens with an assistant message"):
        encoded(chatting(tokenizer, CHATML), first)


def test_a_conversation_without_an_answer_has_nothing_to_learn(tokenizer) -> None:
    asked = Document("messages", "b:1", messages=CONVERSATION.messages[:1])
    (one,) = encoded(chatting(tokenizer, CHATML), asked)
    assert one.loss_mask.sum() == 0


def test_documents_keep_their_order_over_many_batches(tokenizer) -> None:
    texts = [f"number {i}" for i in range(1300)]
    got = encoded(tokenizer, *(Document("text", "a:1", text=text) for text in texts))
    assert [tokenizer.decode(one.input_ids[1:-1]) for one in got] == texts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab", ""), ("", "ab")),
    ],
)
def test_keys_tell_documents_apart_by_content_and_not_by_place(
    one: Sequence[str], other: Sequence[str]
) -> None:
    keys = [
        content_key(Document("pair", where, prompt=prompt, response=response))
        for where, (prompt, response) in (("a:1", one), ("b:2", one), ("a:1", other))
    ]
    assert keys[0] == keys[1] != keys[2]

"""Which fields of a row are read, and what is said of the others."""

import json

import pytest

from shared.config.domains import Domain
from shared.errors import DataError
from shared.text.documents import Document, Message, document_of

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
PARSED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def document(row: dict, **columns: str) -> Document:
    return document_of(row, "a:1", columns)  # type: ignore[arg-type]


def messages(*turns: dict) -> tuple[Message, ...]:
    return document({"messages": list(turns)}).messages


def test_an_alpaca_rows_input_follows_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Tag", "output": "Day", "id": 7}
    columns = {"prompt": "instruction", "response": "output"}
    found = document(row, **columns)
    assert (found.prompt, found.response) == ("Translate.\n\nTag", "Day")
    assert found.unread == ("id",)
    assert document(row | {"input": ""}, **columns).prompt == "Translate."
    assert document(row | {"input": None}, **columns).unread == ("id",)


def test_a_column_that_one_field_takes_is_no_other_field() -> None:
    found = document({"input": "p", "output": "r"}, prompt="input", response="output")
    assert (found.prompt, found.response, found.unread) == ("p", "r", ())
    named = document({"q": "p", "a": "r", "more": "m"}, prompt="q", response="a", input="more")
    assert named.prompt == "p\n\nm"


def test_a_column_that_a_row_lacks_is_named() -> None:
    with pytest.raises(
        DataError, match="no question, which the domain's `columns` names; it has p"
    ):
        document({"prompt": "p", "response": "r"}, prompt="question")

    with pytest.raises(DataError, match=r"no data\.q, which .* what is inside a field is not read"):
        document({"data": {"q": "p"}, "a": "r"}, prompt="data.q", response="a")


def test_two_fields_have_no_column_in_common() -> None:
    with pytest.raises(ValueError, match="columns gives prompt and response the same column, a;"):
        Domain(train="a.jsonl", columns={"prompt": "a", "response": "a"})


def test_what_the_teacher_alone_is_shown_may_be_a_field_of_the_row() -> None:
    columns = Domain(train="a.jsonl", columns={"response": "r", "teacher_prompt": "r"}).columns
    found = document({"prompt": "p", "r": "answer"}, **columns)
    assert (found.response, found.teacher_prompt, found.unread) == ("answer", "answer", ())


def test_a_system_column_is_kept_beside_a_prompt_and_before_messages() -> None:
    assert document({"system": "Be kind.", "prompt": "p", "response": "r"}).system == "Be kind."
    found = document({"system": "Be kind.", "messages": [USER, ANSWER]}).messages
    assert [(m.role, m.content) for m in found][:2] == [("system", "Be kind."), ("user", "hi")]


def test_what_is_not_read_is_named_and_what_holds_nothing_is_not() -> None:
    row = {"text": "x", "licence": "MIT", "prompt": None, "messages": None, "n": 0}
    assert document(row).unread == ("licence", "n")
    assert document({"messages": [USER, ANSWER], "text": "x", "k": 1}).unread == ("text", "k")


@pytest.mark.parametrize(
    ("role", "known"),
    [
        *((role, "user") for role in ("user", "human", "Human", "prompter")),
        *((role, "assistant") for role in ("gpt", "model", "bot", "chatbot", "ai", "Assistant")),
        *((role, "tool") for role in ("tool", "observation", "function_response", "function")),
        ("tool_call", "assistant"),
        *(("developer", "developer"), ("critic", "critic"), ("SYSTEM", "system")),
        *(
            (role, "assistant")
            for role in ("assistant\n", "<|assistant|>", "[\uff21\uff29]:", "gpt\u200b")
        ),
        *(("\ufeffuser", "user"), ("Developer ", "developer"), ("<critic>", "<critic>")),
    ],
)
def test_usual_names_of_roles_are_known(role: str, known: str) -> None:
    for keys in (("role", "content"), ("from", "value")):
        (found,) = messages(dict(zip(keys, (role, "x"), strict=True)))
        assert (found.role, found.content, found.more) == (known, "x", {})


def test_conversations_are_messages_where_no_column_says_otherwise() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert len(document({"conversations": turns}).messages) == 2
    named = document({"conversations": turns, "chat": [USER, ANSWER]}, messages="chat")
    assert named.unread == ("conversations",)


@pytest.mark.parametrize("nothing", [None, "", []])
def test_of_fields_that_hold_nothing_another_is_read(nothing: object) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for name in ("conversations", "conversation"):
        found = document({"messages": nothing, name: turns})
        assert (len(found.messages), found.unread) == (2, ())
    found = document({"messages": nothing, "prompt": "p", "response": "r", "text": None})
    assert (found.kind, found.prompt, found.unread) == ("pair", "p", ())
    assert document({"messages": nothing, "conversations": nothing, "text": "x"}).text == "x"
    both = document({"messages": [USER, ANSWER], "conversations": turns})
    assert (both.messages[0].content, both.unread) == ("hi", ("conversations",))


def test_a_prompt_without_its_response_is_no_empty_text() -> None:
    with pytest.raises(DataError, match="a:1: response is null; write a string"):
        document({"prompt": "p", "response": None, "text": ""})
    assert document({"prompt": "", "response": None, "text": ""}).kind == "text"


@pytest.mark.parametrize("completion", [[ANSWER], "ho"])
def test_a_prompt_of_messages_is_followed_by_its_response_alone_learnt(completion: object) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": completion, "input": "x", "system": "s"}
    found = document(row, response="completion")
    told = [(m.role, m.content, m.learnt) for m in found.messages]
    asked = [("user", "hi", None), ("assistant", "ho", False), ("user", "hi", None)]
    assert told == [("system", "s", None), *asked, ("assistant", "ho", None)]
    assert (found.kind, found.unread) == ("messages", ("input",))


@pytest.mark.parametrize("written", [list, json.dumps])
def test_a_response_that_begins_with_its_prompt_does_not_repeat_it(written) -> None:
    for prompt, response in (
        (written([USER]), written([USER, ANSWER])),
        ("hi", written([USER, ANSWER])),
        ("hi", written([ANSWER])),
        (written([USER]), "ho"),
        ("", written([USER, ANSWER])),
    ):
        found = document({"prompt": prompt, "response": response})
        assert [(m.role, m.content) for m in found.messages] == [
            ("user", "hi"),
            ("assistant", "ho"),
        ]


def test_a_prompt_that_only_looks_like_messages_is_text() -> None:
    for prompt in ('[{"x": 1}]', "[]", "[1, 2", '["role"]'):
        found = document({"prompt": prompt, "response": "r"})
        assert (found.kind, found.prompt) == ("pair", prompt)


def test_conversations_of_a_table_are_read_from_json() -> None:
    assert len(document({"conversations": json.dumps([USER, ANSWER])}).messages) == 2
    with pytest.raises(DataError, match="messages is a bytes, not a list of role and content"):
        document({"messages": json.dumps([USER, ANSWER]).encode()})


def test_calls_and_tools_are_read_from_json_too() -> None:
    call, tool = {"name": "f", "arguments": {"x": 1}}, {"name": "f"}
    told = [json.dumps([CALL]), [call], [call | {"arguments": '{"x": 1}'}]]
    whole = {"type": "function", "function": call}
    for calls, parsed in zip(told, ([PARSED], [whole], [whole]), strict=True):
        turns = [USER, {"role": "assistant", "tool_calls": calls}]
        found = document({"messages": turns, "tools": [json.dumps(tool)]})
        assert found.messages[1].more == {"tool_calls": parsed}
        assert found.tools == (tool,)


def test_tool_calls_tools_and_thoughts_are_kept_for_the_template() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "audio": None},
        {"role": "tool", "tool_call_id": "a", "content": "4"},
        ANSWER | {"reasoning_content": "so"},
    ]
    found = document({"messages": turns, "tools": '[{"name": "f"}]'})
    assert found.messages[1] == Message("assistant", "", {"tool_calls": [PARSED]})
    assert found.messages[2].more == {"tool_call_id": "a"}
    assert found.messages[3].more == {"reasoning_content": "so"}
    assert found.tools == ({"name": "f"},)
    assert not found.unread
    other = document(
        {"messages": [turns[0], turns[1] | {"tool_calls": [PARSED, PARSED]}, *turns[2:]]}
    )
    assert other.strings != found.strings
    (none,) = messages(ANSWER | {"tool_calls": []})
    assert not none.more


NULLS = {"name": None, "arguments": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tool_calls", value) for value in ("null", "[]", [None], [{"function": NULLS}])),
        *(("function_call", value) for value in (NULLS, {"name": "", "arguments": "{}"}, "{}")),
        *(("tool_use", value) for value in (False, 0, [[]], "false", "No", "None", "nan", "0")),
    ],
)
def test_a_call_of_nulls_as_tables_hold_them_is_none(key: str, value: object) -> None:
    _, answer = messages(USER, ANSWER | {key: value})
    assert not answer.more
    with pytest.raises(DataError, match="content of message 2 is null; write a string"):
        messages(USER, {"role": "assistant", "content": None, key: value})


def test_the_texts_of_parts_are_joined() -> None:
    (found,) = messages(
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"text": "b"}, "c"]}
    )
    assert found.content == "a bc"
    parts = [{"type": "input_text", "text": "a"}, {"type": "text", "text": None, "content": "b"}]
    assert messages({"role": "user", "content": parts})[0].content == "ab"
    assert messages({"role": "prompter", "text": "hi"})[0] == Message("user", "hi")


@pytest.mark.parametrize(
    ("key", "value", "learnt"),
    [
        *(("weight", value, learnt) for value, learnt in ((0, False), (1, None), (1.0, None))),
        *(
            (key, False, False)
            for key in ("train", "training", "trainable", "train_on_turn", "loss", "learn")
        ),
        *((("masked", True, False), ("masked", False, None), ("loss_mask", 0, False))),
        *((("loss_scale", 0.0, False), ("is_trainable", False, False), ("skip_loss", 1, False))),
        *((("skip", False, None), ("exclude", 0, None), ("loss_scale", 1.0, None))),
        *(
            (key, False, False)
            for key in ("supervised", "computeLoss", "use_for_training", "learned", "Train")
        ),
        *((key, 0, False) for key in ("apply_loss", "isTrained")),
        *((key, True, False) for key in ("no_backprop", "skipTraining", "unlearnable", "noLoss")),
        *((("supervised", 1, None), ("train_on_this", True, None), ("no_gradient", False, None))),
        *((("train_until_end", True, None), ("train_as_unit", False, False))),
    ],
)
def test_a_message_says_whether_it_is_learnt(key: str, value: object, learnt: bool | None) -> None:
    _, answer = messages(USER, ANSWER | {key: value})
    assert answer.learnt is learnt
    assert not answer.more


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("training_step", "train_count") for value in (0, 1)),
        *(("train_loss", 0.0), ("trainer", False), ("loss_2", 0.3), ("loss2", True)),
    ],
)
def test_a_number_beside_training_is_no_mask(key: str, value: object) -> None:
    _, answer = messages(USER, ANSWER | {key: value})
    assert (answer.learnt, dict(answer.more)) == (None, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("supervised", "false"),
        ("use_for_training", "False"),
        ("supervised", 0.5),
        ("lossMask", [0]),
    ],
)
def test_a_message_that_says_it_in_no_clear_way_is_refused(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"message 2 has {key}: .* write train: true or train"):
        messages(USER, ANSWER | {key: value})


def test_a_users_message_is_learnt_where_it_says_so_alone() -> None:
    said, not_said = messages(USER | {"train": True}, USER | {"weight": 0})
    assert (said.learnt, not_said.learnt) == (True, False)
    assert not_said.strings == messages(USER)[0].strings


def test_what_a_template_need_not_read_does_not_tell_documents_apart() -> None:
    plain, more = (document({"messages": [USER | m, ANSWER]}) for m in ({}, {"id": 7}))
    assert plain.strings == more.strings
    assert plain.strings != document({"messages": [USER, ANSWER | {"train": False}]}).strings

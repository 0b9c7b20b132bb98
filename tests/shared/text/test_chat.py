"""Chat templates of every make: what is learnt of tool calls, thoughts, headers, masked answers."""

import numpy as np
import pytest

from shared.errors import DataError
from shared.text.documents import Document, Message
from tests.shared.text.test_framing import CHATML, chatting, encoded, learnt_texts

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought; answers lose theirs.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}<|im_end|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
# The last answer opens with its thought, be it empty; earlier ones have none.
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = CHATML.partition("{% if add_generation_prompt")[0]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def chat(*turns: Message, **fields) -> Document:
    return Document("messages", "a:1", messages=turns, **fields)


def user(text: str = "Weather?", **more) -> Message:
    return Message("user", text, **more)


def answer(text: str, learnt: bool | None = None, **more) -> Message:
    return Message("assistant", text, more, learnt)


def learnt(tokenizer, *turns: Message, loss_on: str = "responses", **fields) -> list[str]:
    (one,) = encoded(tokenizer, chat(*turns, **fields), loss_on=loss_on)
    return learnt_texts(tokenizer, one)


ENDS_ONCE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
)


def test_eos_after_the_whole_ends_the_last_answer_and_the_templates_mark_the_others(
    tokenizer,
) -> None:
    turns = [user(), answer("a"), user("More."), answer("b c")]
    expected = [" a\n", " b c\n<|eos|>"]
    assert learnt(chatting(tokenizer, ENDS_ONCE), *turns) == expected
    always = ENDS_ONCE.replace("{% else %}{{ eos_token }}{% endif %}", "{% endif %}{{ eos_token }}")
    assert learnt(chatting(tokenizer, always), *turns) == expected
    assert learnt(tokenizer, user(learnt=True), *turns[1:])[0] == "Weather?\n"
    with pytest.raises(DataError, match="message 2, or what ends it, differently when more mess"):
        learnt(chatting(tokenizer, ENDS_ONCE.replace("\n", "")), *turns)


def test_another_end_of_the_last_turn_leaves_the_others_theirs(tokenizer) -> None:
    """As of gpt-oss, where the last answer ends in a token of its own."""
    harmony = CHATML.replace(
        "'<|im_end|>\n'",
        "(eos_token if loop.last and m.role == 'assistant' and"
        " not add_generation_prompt else '<|im_end|>')",
    )
    turns = [user(), answer("a"), user("More."), answer("b c")]
    assert learnt(chatting(tokenizer, harmony), *turns) == ["a<|im_end|>", "b c<|eos|>"]
    unended = harmony.replace("'<|im_end|>'", "''")
    with pytest.raises(DataError, match="message 2, or what ends it, differently when more mess"):
        learnt(chatting(tokenizer, unended), *turns)


def test_a_header_after_the_generation_prompt_is_learnt_where_thoughts_are_left_out(
    tokenizer,
) -> None:
    """As of gpt-oss: the last answer has a thought in a turn of its own before it."""
    channels = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
        "<|im_start|>assistant:think {{ m.thinking }}<|im_end|>{% endif %}"
        "<|im_start|>assistant:final {{ m.content }}"
        "{{ eos_token if loop.last and not add_generation_prompt else '<|im_end|>' }}{% else %}"
        "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    turns = [user(), answer("a", thinking="x"), user("More."), answer("b", thinking="y")]
    assert learnt(chatting(tokenizer, channels), *turns) == [
        ":final a<|im_end|>",
        ":think y<|im_end|><|im_start|>assistant:final b<|eos|>",
    ]


def test_a_template_without_a_place_for_the_answer_is_named(tokenizer) -> None:
    with pytest.raises(DataError, match="does not write message 2; use another template"):
        learnt(chatting(tokenizer, "hello"), user(), answer("a"))


def test_tool_calls_are_learnt_and_what_tools_say_is_not(tokenizer) -> None:
    chatting(tokenizer, TOOLS)
    turns = [user(), answer("", tool_calls=[CALL]), Message("tool", "4 C"), answer("Cold.")]
    expected = ['<call>weather {"city": "Oslo"}</call><|im_end|>', "Cold.<|im_end|>"]
    assert learnt(tokenizer, *turns) == expected
    (one,) = encoded(tokenizer, chat(*turns, tools=({"name": "weather"},)))
    assert '[{"name": "weather"}]' in tokenizer.decode(one.input_ids)
    assert learnt_texts(tokenizer, one) == expected


@pytest.mark.parametrize(
    ("turns", "fields", "says"),
    [
        ([user(), answer("", tool_calls=[CALL])], {}, "a:1 has tool_calls, which the chat templ"),
        ([user(), answer("x", function_call={"name": "f"})], {}, "a:1 has function_call"),
        *(
            ([user(), answer("", **{name: CALL})], {}, f"a:1 has {name}, which the chat template")
            for name in ("tool_call", "function_calls", "toolCalls", "functionCall", "tool_use")
        ),
        ([user(), answer("x")], {"tools": ({"name": "f"},)}, "a:1 has tools, which the chat"),
    ],
)
def test_calls_and_tools_that_a_template_never_reads_are_refused(
    tokenizer, turns, fields, says
) -> None:
    with pytest.raises(DataError, match=says):
        learnt(chatting(tokenizer, CHATML), *turns, **fields)


def test_what_a_template_never_reads_is_remarked(tokenizer) -> None:
    said = answer("4", reasoning_content="2 and 2", id=7)
    (one,) = encoded(chatting(tokenizer, CHATML), chat(user(), said, unread=("licence",)))
    assert one.remarks.unread == ("licence", "reasoning_content", "id")
    assert one.remarks.roles == ("user", "assistant")
    (one,) = encoded(chatting(tokenizer, QWEN_3), chat(user(), said))
    assert one.remarks.unread == ("id",)
    assert learnt_texts(tokenizer, one) == ["<think>\n2 and 2\n</think>\n\n4<|im_end|>"]


def test_a_key_that_a_template_names_and_leaves_out_is_remarked(tokenizer) -> None:
    """It reads a variable of that name; and of earlier answers it writes no thought."""
    named = CHATML.replace(
        "{% for m in", "{% if thinking %}{{ '<think>' }}{% endif %}{% for m in", 1
    )
    said = Message("assistant", "a", more={"thinking": "deep"})
    (one,) = encoded(chatting(tokenizer, named), chat(user(), said))
    assert one.remarks.unread == ("thinking",)
    thought = {"reasoning_content": "hm"}
    turns = (user(), Message("assistant", "a", more=thought))
    (last,) = encoded(chatting(tokenizer, QWEN_3), chat(*turns))
    (both,) = encoded(tokenizer, chat(*turns, user(), Message("assistant", "b", more=thought)))
    assert (last.remarks.unread, both.remarks.unread) == ((), ("reasoning_content",))


def test_a_key_that_says_no_is_remarked_unless_the_template_reads_it(tokenizer) -> None:
    keys = {"supervise": False, "include": 0, "name": "", "spans": [], "quiet": False}
    reading = CHATML.replace("{{ '<|im_start|>'", "{% if m.quiet %}-{% endif %}{{ '<|im_start|>'")
    (one,) = encoded(chatting(tokenizer, reading), chat(user(), answer("a", **keys)))
    assert one.remarks.unread == ("supervise", "include")


@pytest.mark.parametrize(
    ("written", "left_out"),
    [
        ("{{ m.tool_calls[0] | tojson }}", "call 2"),
        ("{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}", "the argument city of c"),
        (
            "{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}",
            "the argument unit of call 2",
        ),
    ],
)
def test_a_call_or_an_argument_that_a_template_leaves_out_is_refused(
    tokenizer, written: str, left_out: str
) -> None:
    template = CHATML.replace("+ m.content +", "+ m.content }}{% if m.tool_calls %}CALLS{{ '' +", 1)
    template = template.replace("CALLS{{", written + "{% endif %}{{")
    more = {"function": {"name": "weather", "arguments": {"city": "Rome", "unit": "C"}}}
    calls = answer("", tool_calls=[CALL, more])
    with pytest.raises(DataError, match=f"a:1 has tool_calls with {left_out}.* never reads"):
        learnt(chatting(tokenizer, template), user(), calls)
    (text,) = learnt(chatting(tokenizer, TOOLS), user(), calls)
    assert "Oslo" in text
    assert '"unit": "C"' in text


@pytest.mark.parametrize(
    "written",
    [
        "{# tools are not written #}",
        "{% if tools and messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}",
        "{% if tools %}{{ tools[0] | tojson }}{% endif %}",
        "{% if tools %}There are tools.{% endif %}",
    ],
)
def test_tools_that_a_row_does_not_show_are_refused(tokenizer, written: str) -> None:
    tools = ({"type": "function", "function": {"name": "f"}}, {"name": "g"})
    with pytest.raises(DataError, match="a:1 has tools, which the chat"):
        learnt(chatting(tokenizer, written + CHATML), user(), answer("a"), tools=tools)
    system = Message("system", "Be kind.")
    if "role" in written:
        assert learnt(tokenizer, system, user(), answer("a"), tools=tools) == ["a<|im_end|>"]


def test_a_call_that_a_template_writes_in_place_of_content_alone_is_refused_beside_some(
    tokenizer,
) -> None:
    alone = CHATML.replace("+ m.content +", "+ (m.content or (m.tool_calls | tojson)) +")
    (one,) = encoded(
        chatting(tokenizer, alone),
        chat(user(), Message("assistant", "", more={"tool_calls": [CALL]})),
    )
    assert "Oslo" in learnt_texts(tokenizer, one)[0]
    with pytest.raises(DataError, match=r"has tool_calls, which the chat template .* never reads"):
        encoded(tokenizer, chat(user(), Message("assistant", "so", more={"tool_calls": [CALL]})))


@pytest.mark.parametrize("called", ["weather(Oslo)", ["weather", "Oslo"], True])
def test_a_call_that_is_no_object_is_learnt_as_its_template_writes_it(tokenizer, called) -> None:
    template = CHATML.replace("+ m.content +", "+ (m.content or (m.tool_use | string)) +")
    (text,) = learnt(chatting(tokenizer, template), user(), answer("", tool_use=called))
    assert text == f"{called}<|im_end|>"


def test_special_tokens_in_what_tools_say_of_themselves_are_text(tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x<|im_end|>y"}}
    with_mark = chat(user(), Message("assistant", "a"), tools=(tool,))
    (one,) = encoded(chatting(tokenizer, TOOLS), with_mark)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert one.input_ids.tolist().count(end) == 3  # of the tools and of two turns
    assert "x<|im_end|>y" in tokenizer.decode(one.input_ids)


def test_a_header_that_a_template_writes_unasked_is_not_learnt(tokenizer) -> None:
    chatting(tokenizer, HEADERS)
    turns = [user(), answer("a"), user("More."), answer("b c")]
    assert learnt(tokenizer, *turns) == ["a<|im_end|>", "b c<|im_end|>"]
    chatting(tokenizer, TOOLS.partition("{% if add_generation_prompt")[0])
    (called,) = learnt(tokenizer, user(), answer("", tool_calls=[CALL]))
    assert called.startswith("<call>weather")


def test_an_answer_may_open_otherwise_than_the_generation_prompt(tokenizer) -> None:
    (one,) = encoded(chatting(tokenizer, R1), chat(user(), answer("Five.")))
    assert learnt_texts(tokenizer, one) == ["Five.<|eos|>"]
    assert one.remarks.other_openings == 1


def test_an_answer_that_would_lose_its_thought_is_refused_with_the_reason(tokenizer) -> None:
    thought = answer("<think>\nadd\n</think>\nFive.")
    with pytest.raises(DataError, match="leaves out or changes a part of message 2, the answer"):
        learnt(chatting(tokenizer, R1), user(), thought)
    (whole,) = encoded(tokenizer, chat(user(), thought), loss_on="everything")
    assert whole.remarks.changed_messages == 1
    (one,) = encoded(tokenizer, chat(user(), thought, user("More."), answer("Six.")))
    assert one.remarks.changed_messages == 1
    assert learnt_texts(tokenizer, one) == ["\nFive.<|eos|>", "Six.<|eos|>"]


def test_a_thought_before_the_last_answer_alone_does_not_hide_earlier_ones(tokenizer) -> None:
    chatting(tokenizer, QWEN_3)
    turns = [user(), answer("a"), user("More."), answer("b", reasoning_content="hm")]
    expected = ["a<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert learnt(tokenizer, *turns) == expected
    turns[1] = answer("a", reasoning_content="a thought of many words, " * 40)
    assert learnt(tokenizer, *turns) == expected


def test_thoughts_and_calls_before_the_last_question_leave_answers_to_be_found(tokenizer) -> None:
    """A template that tells by the last question which thoughts it writes."""
    tail = (
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning }}</think>"
    )
    thinking = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + TOOLS
    ).replace("{{ m.content }}", tail + "{% endif %}{{ m.content.split('</think>')[-1] }}")
    chatting(tokenizer, thinking)
    called = answer("", tool_calls=[CALL], reasoning="call it")
    turns = [user(), called, Message("tool", "4 C"), answer("Cold.", reasoning="so")]
    call = '<call>weather {"city": "Oslo"}</call><|im_end|>'
    assert learnt(tokenizer, *turns) == [
        f"<think>call it</think>{call}",
        "<think>so</think>Cold.<|im_end|>",
    ]
    more = [user("Thanks."), answer("Sure.", reasoning="nice")]
    last = "<think>nice</think>Sure.<|im_end|>"
    assert learnt(tokenizer, *turns, *more) == [call, "Cold.<|im_end|>", last]
    turns[3] = answer("<think>in the words</think>Cold.", reasoning="so")
    assert learnt(tokenizer, *turns, *more) == [call, "Cold.<|im_end|>", last]


def test_masked_answers_are_not_learnt_and_users_are_where_they_say_so(tokenizer) -> None:
    chatting(tokenizer, CHATML)
    turns = [user("Q", learnt=True), answer("a", learnt=False), user("More."), answer("b")]
    assert learnt(tokenizer, *turns) == ["Q<|im_end|>", "b<|im_end|>"]
    whole = "".join(learnt(tokenizer, *turns, loss_on="everything"))
    assert "a<|im_end|>" not in whole.replace("user", "")
    assert whole.count("<|im_end|>") == 3
    turns = [user("Q", learnt=False), answer("a", learnt=True)]
    assert learnt(tokenizer, *turns, loss_on="everything") == [
        "user\n",
        "\n<|im_start|>assistant\na<|im_end|>\n",
    ]


def test_an_empty_answer_ends_without_the_space_before_the_next_turn(tokenizer) -> None:
    assert learnt(chatting(tokenizer, CHATML), user(), answer("")) == ["<|im_end|>"]


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ messages[9].content }}"])
def test_a_template_that_fails_in_its_own_way_is_named_with_the_row(tokenizer, template) -> None:
    chatting(tokenizer, template)
    with pytest.raises(DataError, match=r"a:1: the chat template of .* refuses the conversation"):
        learnt(tokenizer, user(), answer("a"))


def test_one_of_several_templates_is_the_default_or_the_one_for_tools(tokenizer) -> None:
    tokenizer = chatting(tokenizer, CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    turns = [user(), answer("", tool_calls=[CALL])]
    assert "<call>" in learnt(tokenizer, *turns, tools=({"name": "weather"},))[0]
    with pytest.raises(DataError, match="has tool_calls, which the chat template"):
        learnt(tokenizer, *turns)
    tokenizer.chat_template = {"chat": CHATML, "tool_use": TOOLS}
    with pytest.raises(DataError, match=r"several, chat, tool_use, none .* set data\.chat_templat"):
        learnt(tokenizer, user(), answer("a"))


@pytest.mark.parametrize(
    "today",
    [
        "{{ strftime_now('%d %b %Y %H:%M') }}",
        "{% set form = '%d %b %Y %H:%M' %}{{ strftime_now(form) }}",
        "{% macro now(form) %}{{ strftime_now(form) }}{% endmacro %}{{ now('%d %b %Y %H:%M') }}",
        "{{ strftime_now('%d %b') + strftime_now (' %Y %H:%M') if strftime_now is defined }}",
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_every_day(tokenizer, today: str) -> None:
    chatting(tokenizer, today + CHATML)
    (one,) = encoded(tokenizer, chat(user(), answer("a")))
    assert tokenizer.decode(one.input_ids).startswith("26 Jul 2024 00:00<|im_start|>")


def test_a_pairs_system_is_a_message_or_a_line(tokenizer) -> None:
    pair = Document("pair", "a:1", prompt="p", response="r", system="Be kind.")
    (plain,) = encoded(tokenizer, pair)
    assert tokenizer.decode(plain.input_ids) == "<|bos|>Be kind.\np\nr<|eos|>"
    assert learnt_texts(tokenizer, plain)[0].endswith("r<|eos|>")
    (one,) = encoded(chatting(tokenizer, CHATML), pair)
    assert tokenizer.decode(one.input_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert np.flatnonzero(one.loss_mask).size == len(tokenizer("r")["input_ids"]) + 1

"""Rows as documents: which of a row's fields are read, under which names, and what they may be.

A row is `{"text"}`, `{"prompt", "response"}` or `{"messages": [{"role", "content"}, ...]}`; beside
a prompt stand `input`, `system` and `history`, beside messages `system` and `tools`. A prompt may
be messages too, which a response follows. A message may carry more for the chat template
(`tool_calls`, `reasoning_content`, ...) and say whether it is learnt.
Every defect is a DataError that names file and line.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shared.errors import DataError
from shared.images.row_image import RowImage
from shared.text.formats import as_string, kind_in_words
from shared.text.masks import is_unfinished, message_is_learnt, row_is_learnt
from shared.text.nested import (
    CALLS,
    calls_nothing,
    from_json,
    history_in,
    pairs_in,
    parsed_calls,
)

Named = Literal["text", "prompt", "response", "messages", "input", "system", "tools", "history"]
Field = Literal[Named, "teacher_prompt", "label", "entities", "chosen", "rejected", "images"]
Columns = Mapping[Field, str]
Kind = Literal["text", "pair", "messages"]
_SHAPED: tuple[Field, ...] = ("text", "prompt", "response", "messages")
FIELDS: tuple[Field, ...] = (*_SHAPED, "input", "system", "tools", "history")
CONVERSATIONS = ("conversations", "conversation")  # what others call `messages`
SHAPES = "text, prompt with response, or messages"

# Other names of the roles that chat templates know.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer", "instruction"), "user"),
    **dict.fromkeys(
        (
            *("assistant", "gpt", "model", "bot", "chatbot", "ai", "agent", "chatgpt", "claude"),
            *("llm", "function_call", "tool_call"),
        ),
        "assistant",
    ),
    **{name: name for name in ("system", "developer", "ipython")},
    **dict.fromkeys(
        ("tool", "observation", "tool_response", "function", "function_response"), "tool"
    ),
}
KNOWN_ROLES = frozenset(ROLES.values())
AROUND = re.compile(r"^\W+|\W+$")  # of a role: spaces, marks without width, <| |>, a colon
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
PART_TYPES, PART_KEYS = ("text", "input_text", "output_text"), ("text", "content", "value")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of ROLES' where the row's is another name of it
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)  # what else a chat template may read
    learnt: bool | None = None  # None: learnt where the role is the assistant's

    @property
    def strings(self) -> tuple[str, ...]:
        """The content, by which two messages are the same."""
        written = {key: self.more[key] for key in (*CALLS, *THOUGHTS) if key in self.more}
        told = [json.dumps(written, sort_keys=True, default=str)] if written else []
        told += ["unfinished"] if is_unfinished({**self.more, "role": self.role}) else []
        return (
            self.role,
            self.content,
            *told,
            *([str(self.learnt)] if self._differs_from_its_role else []),
        )

    @property
    def _differs_from_its_role(self) -> bool:
        return self.learnt is not None and self.learnt != (self.role == "assistant")


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a source; the fields of its kind are filled."""

    kind: Kind
    where: str  # file:line
    text: str = ""
    prompt: str = ""
    response: str = ""
    messages: tuple[Message, ...] = ()
    system: str = ""  # of a pair
    tools: tuple[Any, ...] = ()  # of a conversation: what its template offers the assistant
    unread: tuple[str, ...] = field(default=(), compare=False)  # fields of the row left aside
    teacher_prompt: str = field(default="", compare=False)  # what the teacher alone is shown
    images: tuple[RowImage, ...] = ()  # in the order of their places in the text

    @property
    def strings(self) -> tuple[str, ...]:
        """The content, by which two documents are the same."""
        turns = (part for m in self.messages for part in m.strings)
        more = [self.system] if self.system else []
        more += [json.dumps(self.tools, sort_keys=True, default=str)] if self.tools else []
        more += [image.digest for image in self.images]
        return (self.kind, self.text, self.prompt, self.response, *turns, *more)


def document_of(
    row: object, where: str, columns: Columns, *, learns_history: bool = True
) -> Document:
    """A row as a document; `columns` maps our field names to the row's, `learns_history` says
    whether earlier answers of a prompt's history are learnt. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {kind_in_words(row)}, not an object with one of {SHAPES}")
    names = _names_in(row, columns)
    found: dict[Field, Any] = {field: row[name] for field, name in names.items()}
    if not _is_nothing(found.get("messages")):
        used = ("messages", "system", "tools")
        turns = _messages(found["messages"], where, "messages")
        document = _conversation(found, where, turns)
    elif _is_pair(found) and _is_talk(found["prompt"], found["response"]):
        used = ("prompt", "response", "system", "tools")
        document = _conversation(found, where, _asked_and_answered(found, where))
    elif _is_pair(found):
        used = ("prompt", "response", "input", "system", "tools")
        document = _pair(found, where)
        if (history := history_in(found.get("history"))) is not None:
            used = (*used, "history")
            document = _going_on(document, history, None if learns_history else False)
    elif _is_text(found):
        text = as_string(found["text"], where, names["text"])
        used, document = ("text",), Document("text", where, text=text)
    elif found.get("messages") == []:
        raise DataError(f"{where}: {names['messages']} is an empty list; leave the row out")
    else:
        raise DataError(_no_fields(where, row, names, columns))
    read = {names[field] for field in FIELDS if field in used and field in names}
    shown = columns.get("teacher_prompt")  # read where it is named alone
    if shown is not None:
        read.add(shown)
        document = replace(document, teacher_prompt=_optional(row.get(shown), where, shown))
    others = (n for n in row if n not in read and row_is_learnt(n, row[n]) is None)
    unread = (str(name) for name in others if not _is_spare(row[name], name, names))
    return replace(document, unread=tuple(unread))


def columns_read(columns: Columns) -> frozenset[str]:
    """Every name under which a field may stand in a source."""
    return frozenset((*FIELDS, "label", "chosen", "rejected", *columns.values(), *CONVERSATIONS))


def _names_in(row: Mapping[str, Any], columns: Columns) -> dict[Field, str]:
    """The names that a row has for our fields. A column that `columns` gives to one field is no
    other field under its own name."""
    taken = set(columns.values())
    names: dict[Field, str] = {}
    for one in FIELDS:
        default = one if one not in taken else None
        name = columns.get(one, default)
        if name is not None and name in row:
            names[one] = name
    if "messages" not in columns and _is_nothing(row.get(names.get("messages", ""))):
        others = (name for name in CONVERSATIONS if name not in taken)
        other = next((name for name in others if _is_conversation(row.get(name))), None)
        if other is not None:
            names["messages"] = other
    return names


def _is_nothing(value: object) -> bool:
    return value is None or value == "" or value == []


def _is_conversation(value: object) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, list | Mapping) and bool(value)


def _is_talk(prompt: object, response: object) -> bool:
    return isinstance(prompt, list) or any(map(_is_turns, (prompt, response)))


def _is_turns(value: object) -> bool:
    """Whether a prompt or a response is messages, be it as JSON in a table."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(t, Mapping) and {*ROLE_KEYS} & {*t} for t in turns)


def _is_pair(found: Mapping[Field, Any]) -> bool:
    prompt, response, text = (found.get(field) for field in ("prompt", "response", "text"))
    return prompt is not None and response is not None and bool(prompt or response or text is None)


def _is_text(found: Mapping[Field, Any]) -> bool:
    text, *pair = (found.get(field) for field in ("text", "prompt", "response"))
    return text is not None and bool(text or not any(pair))


def _is_spare(value: object, name: str, names: Mapping[Field, str]) -> bool:
    """Whether a field of ours holds nothing, as in a table that has columns for several kinds."""
    return name in (*names.values(), "messages") and _is_nothing(value)


def _pair(found: Mapping[Field, Any], where: str) -> Document:
    prompt, response = (as_string(found[f], where, f) for f in ("prompt", "response"))
    more, system = (_optional(found.get(f), where, f) for f in ("input", "system"))
    if more.strip():
        prompt = f"{prompt}\n\n{more}"
    tools = _tools(found.get("tools"), where)
    return Document("pair", where, prompt=prompt, response=response, system=system, tools=tools)


def _going_on(pair: Document, history: list, learnt: bool | None) -> Document:
    """A prompt and its response as the last turns of a conversation."""
    earlier = tuple(
        Message(role, text, learnt=learnt if role == "assistant" else None)
        for turns in pairs_in(history, pair.where)
        for role, text in zip(("user", "assistant"), turns, strict=True)
    )
    if not earlier:
        return pair
    system = (Message("system", pair.system),) if pair.system else ()
    last = (Message("user", pair.prompt), Message("assistant", pair.response))
    turns = (*system, *earlier, *last)
    return Document("messages", pair.where, messages=turns, tools=pair.tools)


def _asked_and_answered(found: Mapping[Field, Any], where: str) -> tuple[Message, ...]:
    """Messages of a prompt, none of which is learnt, and of its response, which may repeat them."""
    asked = _spoken(found["prompt"], "user", where, "prompt")
    answered = _spoken(found["response"], "assistant", where, "response")
    if answered[: len(asked)] == asked:
        answered = answered[len(asked) :]
    shown = (
        replace(m, learnt=False) if m.role == "assistant" and m.learnt is None else m for m in asked
    )
    return (*shown, *answered)


def _spoken(value: object, role: str, where: str, name: str) -> tuple[Message, ...]:
    if isinstance(value, str) and not _is_turns(value):
        return (Message(role, as_string(value, where, name)),) if value else ()
    return _messages(value, where, name)


def _conversation(
    found: Mapping[Field, Any], where: str, messages: tuple[Message, ...]
) -> Document:
    system = _optional(found.get("system"), where, "system")
    if system and messages[0].role == "system":
        raise DataError(
            f"{where} has a system field and opens with a system message; leave one of them out"
        )
    if system:
        messages = (Message("system", system), *messages)
    tools = _tools(found.get("tools"), where)
    return Document("messages", where, messages=messages, tools=tools)


def _tools(value: object, where: str) -> tuple[Any, ...]:
    value = from_json(value, where, "tools")
    if value is None:
        return ()
    if isinstance(value, list):
        value = [from_json(tool, where, "a tool", opens="{") for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{where}: tools is {kind_in_words(value)}, not a list of objects")
    return tuple(value)


def _messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    value = from_json(value, where, name)
    if isinstance(value, Mapping):
        value = _turns_in_columns(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(
            f"{where}: {name} is {kind_in_words(value)}, not a list of role and content"
        )
    return tuple(_message(turn, f"message {n}", where) for n, turn in enumerate(value, start=1))


def _turns_in_columns(value: Mapping[str, Any]) -> Any:
    """The turns of an object with a list for each key, as some tables hold a list of objects."""
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def _message(turn: object, name: str, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"{where}: {name} is {kind_in_words(turn)}, not an object with role and content"
        )
    role_key, content_key = (
        next((key for key in keys if turn.get(key) is not None), None)
        for keys in (ROLE_KEYS, CONTENT_KEYS)
    )
    more = {str(key): value for key, value in turn.items() if not _is_unsaid(key, value)}
    for key in (role_key, content_key):
        more.pop(key or "", None)
    called = any(more.get(key) for key in CALLS)
    if role_key is None or (content_key is None and not called):
        for key in (*ROLE_KEYS, *CONTENT_KEYS):
            if key in turn and turn[key] is None:
                raise DataError(f"{where}: {key} of {name} is null; write a string")
        has = ", ".join(map(str, turn)) or "nothing"
        raise DataError(f"{where}: {name} is not an object with role and content, it has {has:.99}")
    role = as_string(turn[role_key], where, f"{role_key} of {name}")
    role = ROLES.get(AROUND.sub("", unicodedata.normalize("NFKC", role)).lower(), role)
    if not role.strip():
        raise DataError(f"{where}: {role_key} of {name} is empty; name who speaks")
    content = "" if content_key is None else _content(turn[content_key], where, name)
    learnt = message_is_learnt(more, role, where, name)
    return Message(role, content, parsed_calls(more, where, name), learnt)


def _is_unsaid(key: object, value: object) -> bool:
    return value is None or (key in CALLS and calls_nothing(value))


def _content(value: object, where: str, name: str) -> str:
    """Text, or the texts of parts, joined."""
    if not isinstance(value, list):
        return as_string(value, where, f"content of {name}")
    texts = []
    for part in value:
        told = part if isinstance(part, Mapping) else {"text": part}
        key = next((key for key in PART_KEYS if told.get(key) is not None), None)
        kind = told.get("type", "text")
        if kind not in PART_TYPES or key is None:
            what = f"of type {kind!r}" if kind not in PART_TYPES else "without a text"
            raise DataError(
                f"{where}: content of {name} has a part {what}; only text is read, so leave the "
                "row or the part out"
            )
        texts.append(as_string(told[key], where, f"a part of the content of {name}"))
    return "".join(texts)


def _no_fields(
    where: str, row: Mapping[str, Any], names: Mapping[Field, str], columns: Columns
) -> str:
    nulls = [name for field, name in names.items() if row[name] is None and field in _SHAPED]
    if nulls:
        return (
            f"{where}: {' and '.join(nulls)} is null; write a string, or leave the row out (in a "
            "table NaN, null and None are null, in .jsonl words)"
        )
    listed = [f"{name!s:.40}" for name in row]
    rest = [f"{len(listed) - 12} more"] if len(listed) > 12 else []
    has = f"it has {', '.join([*listed[:12], *rest])}" if row else "it is empty"
    absent = [name for name in columns.values() if name not in row]
    if absent:
        is_inside = any(isinstance(row.get(name.partition(".")[0]), Mapping) for name in absent)
        more = "; what is inside a field is not read, so write it as one" if is_inside else ""
        return (
            f"{where} has no {' and no '.join(absent)}, which the domain's `columns` names; {has}: "
            f"name the row's own fields there{more}"
        )
    return f"{where} has no {SHAPES}; {has}: name its fields under the domain's `columns`" + (
        ", `input` and `system` among them" if {"input", "system"} & set(map(str, row)) else ""
    )


def _optional(value: object, where: str, name: str) -> str:
    return "" if value is None else as_string(value, where, name)

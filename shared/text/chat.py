"""Conversations as a chat template writes them, and where in that text the learnt words are."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from shared.errors import DataError
from shared.text.documents import CALLS, THOUGHTS, Document
from shared.text.masks import is_unfinished, says_unfinished

Span = tuple[int, int]  # characters [start, stop)
Turn = dict[str, Any]
PLACE = "\ufdd1"  # no character: stands for a message's content, or ends a name
# What templates that write the date are told it is, so that rows are the same on every day;
# the date of Llama's own templates where they know no clock.
DATE = datetime(2024, 7, 26)
DIRECTIVES = [
    f"%{mark}{letter}" for mark in ("-", "") for letter in "aAbBcdefFDGHIjklmMpRSTuUVwWxXyYzZ"
]


class ChatTokenizer(Protocol):
    """What is asked of a tokenizer here; transformers' ones fit."""

    chat_template: Any
    name_or_path: str
    all_special_tokens: list[str]

    def apply_chat_template(self, conversation: list[Turn], **options: Any) -> Any:
        """A conversation as text."""
        ...


class Conversation:
    """One document under a tokenizer's chat template."""

    def __init__(
        self,
        document: Document,
        turns: list[Turn],
        tokenizer: ChatTokenizer,
        *,
        tools: list[Any] | None = None,
    ) -> None:
        """`turns` are the document's messages, as `turns_of` gives them; `tools` stand in place of
        its own."""
        self.where, self.turns, self.tokenizer = document.where, turns, tokenizer
        self.tools = list(document.tools) if tools is None else tools
        source = _source(tokenizer, with_tools=bool(document.tools), where=document.where)
        self.source = _of_one_day(source)
        self._openings: set[int] = set()  # of answers that begin in another way than asked
        self.text = self._rendered(turns)
        self._refuse_unread_calls()

    @property
    def other_openings(self) -> int:
        """Answers, of those looked for, that do not begin as the generation prompt says."""
        return len(self._openings)

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys of messages without which the template writes the same, in any message; those of
        calls are refused before."""
        keys = dict.fromkeys(key for turn in self.turns for key in turn if not _of_end(turn, key))
        known = ("role", "content", *CALLS)
        return tuple(key for key in keys if key not in known and self._unread(key))

    def num_changed(self, *, learns_answers: bool) -> int:
        """Messages whose content the template leaves out or changes, whitespace aside.

        Raises DataError where that is the last answer and answers are what is learnt: it would be
        learnt without the missing part.
        """
        changed = [n for n, turn in enumerate(self.turns) if not self._holds(turn["content"])]
        last = max((n for n, t in enumerate(self.turns) if t["role"] == "assistant"), default=None)
        if learns_answers and last in changed:
            raise DataError(
                f"{self.where}: the chat template of {self.tokenizer.name_or_path} leaves out or "
                f"changes a part of message {last + 1}, the answer (templates of reasoning models "
                "remove thoughts); take that part out of the row, or use a template that writes it"
            )
        return len(changed)

    def num_empty(self, numbers: Sequence[int]) -> int:
        """How many of the messages at `numbers` have neither content nor a call or a thought that
        the template writes."""
        said = ("content", *CALLS, *(key for key in THOUGHTS if key not in self.unread))
        texts = [[self.turns[n].get(key) for key in said] for n in numbers]
        return sum(not any(str(one or "").strip() for one in parts) for parts in texts)

    def spans(self, numbers: Sequence[int]) -> tuple[Span, ...]:
        """Characters of the messages at `numbers`: their content and whatever ends their turn."""
        return tuple(self._span(number) for number in numbers)

    def endings(self, numbers: Sequence[int]) -> tuple[Span, ...]:
        """What the template writes after the content of the messages at `numbers`."""
        return tuple(self._ending(number) for number in numbers)

    def _ending(self, number: int) -> Span:
        """From the end of the content to that of the turn; of the last one to that of the text."""
        is_last = number == len(self.turns) - 1
        stop = len(self.text) if is_last else self._span(number)[1]
        content = self.turns[number]["content"]
        for told in (content, content.rstrip()):
            turn = {**self.turns[number], "content": told + PLACE}
            whole = self._rendered([*self.turns[:number], turn, *self.turns[number + 1 :]])
            before, found, _ = whole.partition(PLACE)
            if found and self.text.startswith(before):
                return len(before), stop
        raise DataError(
            f"{self.where}: message {number + 1} is not finished, as it says itself, and where the "
            f"chat template of {self.tokenizer.name_or_path} ends it cannot be found; leave the "
            "row out, or say by train: false that the message is not learnt"
        )

    def _span(self, number: int) -> Span:
        """A turn opens where the conversation before it ends, generation prompt included, and
        closes where the conversation up to it ends."""
        turn, upto = self.turns[number], self._upto(number)
        if turn["role"] != "assistant":
            return self._span_of_content(number, upto)
        if number == 0:
            raise DataError(
                f"{self.where} opens with an assistant message; put a user message first"
            )
        before = self._rendered(self.turns[:number], ask=True)
        if not upto.startswith(before):
            self._openings.add(number)
            return self._span_of_content(number, upto)
        if not self.text.startswith(upto):
            unasked = self._rendered(self.turns[:number])
            asked = before[_num_shared(before, unasked) :]
            return self._span_in_whole(number, asked=asked)
        start, own = len(before), upto[len(before) :]
        if self._writes_header(number, before, own):
            return self._span_of_content(number, upto)
        return start, start + _written(own, turn["content"])

    def _upto(self, number: int) -> str:
        """The conversation up to a message, without the special token that a template writes once,
        after the whole, where something else ends the message."""
        upto = self._rendered(self.turns[: number + 1])
        if self.text.startswith(upto):
            return upto
        trimmed = upto.rstrip()
        ends = (token for token in self.tokenizer.all_special_tokens if trimmed.endswith(token))
        opened = trimmed.removesuffix(next(ends, ""))
        if not self.text.startswith(opened):
            return upto
        mark = self._mark(number, after=self.text[len(opened) :])
        content = self.turns[number]["content"]
        is_ended = bool(mark) or not (content and opened.endswith(content))
        return opened + mark if is_ended else upto

    def _mark(self, number: int, *, after: str) -> str:
        """What stands between a message and the special token that opens the next one, as it opens
        the generation prompt; nothing where no such token does."""
        turns = self.turns[:number] or self.turns[:1]
        before, unasked = self._rendered(turns, ask=True), self._rendered(turns)
        asked = before[_num_shared(before, unasked) :]
        header = next((t for t in self.tokenizer.all_special_tokens if asked.startswith(t)), None)
        mark, found, _ = after.partition(header) if header else ("", "", "")
        following = self.turns[number + 1]["content"].strip()
        return mark if found and not (following and following in mark) else ""

    def _span_of_content(self, number: int, upto: str) -> Span:
        """From the first character of the content, for turns that open in no way of their own."""
        turn = {"role": self.turns[number]["role"], "content": PLACE}
        start = self._rendered([*self.turns[:number], turn]).find(PLACE)
        if start < 0:
            raise DataError(
                f"{self.where}: the chat template of {self.tokenizer.name_or_path} does not write "
                f"message {number + 1}; use another template, or leave the row out"
            )
        if not self.text.startswith(upto):
            raise DataError(self._moves(number))
        return start, start + _written(upto[start:], self.turns[number]["content"])

    def _writes_header(self, number: int, before: str, own: str) -> bool:
        """Whether a turn writes its header itself, as the template knows no generation prompt."""
        content = self.turns[number]["content"].strip()
        if content and own.lstrip().startswith(content):
            return False
        return before == self._rendered(self.turns[:number])

    def _span_in_whole(self, number: int, *, asked: str) -> Span:
        """A turn that the whole conversation has otherwise than its beginning, as where earlier
        answers lose their thoughts: what stands between the generation prompt, which `asked` is,
        and what ends the turn."""
        turn = {**self.turns[number], "content": PLACE}
        whole = self._rendered([*self.turns[:number], turn, *self.turns[number + 1 :]])
        before, found, after = whole.partition(PLACE)
        alone, _, ending = self._rendered([*self.turns[:number], turn]).partition(PLACE)
        content = self.text[len(before) : len(self.text) - len(after)]
        if not self.turns[number]["content"]:
            content, ending = "", ending.lstrip()
        if not self.text.startswith(before + (content + ending).rstrip()):
            ending = self._mark(number, after=after) or ending
        own, start = content + ending, before.rfind(asked) + len(asked)
        header = before[start:]  # of the answer's own, after the generation prompt
        opens = start >= len(asked) and (not header or alone.endswith(asked + header))
        if not (found and asked.strip() and opens and self.text.startswith(before + own.rstrip())):
            raise DataError(self._moves(number))
        return start, len(before) + _written(own, content)

    def _moves(self, number: int) -> str:
        return (
            f"{self.where}: the chat template of {self.tokenizer.name_or_path} renders message "
            f"{number + 1}, or what ends it, differently when more messages follow, so the "
            "assistant's tokens cannot be found; set data.loss_on to everything or give one answer "
            "per row"
        )

    def _rendered(
        self, turns: list[Turn], *, ask: bool = False, tools: list[Any] | None = None
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=(self.tools if tools is None else tools) or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except Exception as error:  # a template is a program, which fails in its own ways
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{self.where}: the chat template of {self.tokenizer.name_or_path} refuses the "
                f"conversation ({reason[0]}); change the row or the template"
            ) from None

    def _holds(self, content: str) -> bool:
        stripped = content.strip()
        return stripped in self.text or "".join(content.split()) in "".join(self.text.split())

    def _unread(self, key: str) -> bool:
        """Whether the template writes the same without a message's key, and, where its value is
        false, with a true one."""
        told = [(n, turn) for n, turn in enumerate(self.turns) if _says(turn.get(key))]
        return any(
            self._writes_the_same(n, {name: value for name, value in turn.items() if name != key})
            and bool(turn[key] or self._writes_the_same(n, turn | {key: True}))
            for n, turn in told
        )

    def _writes_the_same(self, number: int, turn: Turn) -> bool:
        """Whether the template writes the same with another message in a message's place."""
        return self._renders_as_text([*self.turns[:number], turn, *self.turns[number + 1 :]])

    def _renders_as_text(self, turns: list[Turn], tools: list[Any] | None = None) -> bool:
        try:
            return self._rendered(turns, tools=tools) == self.text
        except DataError:
            return False

    def _unread_parts(self) -> Iterator[str]:
        """What the template leaves out of calls and tools."""
        yield from (key for key in CALLS if self._unread(key))
        for number, turn in enumerate(self.turns):
            for key in CALLS:
                for part, value in _parts_left_out(turn.get(key)):
                    if self._writes_the_same(number, turn | {key: value}):
                        yield f"{key} with {part} in message {number + 1}"
        for at in dict.fromkeys((0, len(self.tools) - 1) if self.tools else ()):
            others = [*self.tools[:at], _renamed(self.tools[at]), *self.tools[at + 1 :]]
            if self._renders_as_text(self.turns, others):
                yield "tools"

    def _refuse_unread_calls(self) -> None:
        """An answer without its call, or a call without its tools, would be learnt as if whole."""
        unread = next(self._unread_parts(), None)
        if unread:
            raise DataError(
                f"{self.where} has {unread}, which the chat template of "
                f"{self.tokenizer.name_or_path} never reads; use a tokenizer whose template "
                "writes tool calls, or leave such rows out"
            )


def turns_of(document: Document) -> list[Turn]:
    """A prompt and its response, or messages, as a chat template takes them."""
    if document.kind == "pair":
        system = [{"role": "system", "content": document.system}] if document.system else []
        return [
            *system,
            {"role": "user", "content": document.prompt},
            {"role": "assistant", "content": document.response},
        ]
    return [{"role": m.role, "content": m.content, **m.more} for m in document.messages]


def chosen_template(template: Any, name: str | None, *, model: str) -> Any:
    """What a tokenizer that has several named templates is to use; None: whichever fits the row.

    Raises DataError for a name it does not have.
    """
    if name is None:
        return template
    if not isinstance(template, Mapping) or name not in template:
        has = ", ".join(template) if isinstance(template, Mapping) else "none with a name"
        raise DataError(
            f"data.chat_template is {name!r}, but the templates of {model} are: {has}; name one of "
            "them, or leave the option out"
        )
    return template[name]


def _source(tokenizer: ChatTokenizer, *, with_tools: bool, where: str) -> str:
    """The text of the template for a row; with tools the one named so, as transformers takes it."""
    template = tokenizer.chat_template
    if not isinstance(template, Mapping):
        return template
    if with_tools and "tool_use" in template:
        return template["tool_use"]
    if "default" in template:
        return template["default"]
    raise DataError(
        f"{where} is written by a chat template, and the tokenizer of {tokenizer.name_or_path} has "
        f"several, {', '.join(template)}, none of them named default; set data.chat_template to one"
    )


def _of_one_day(source: str) -> str:
    """A template whose clock stands at `DATE`: its own `strftime_now` in place of the library's."""
    if "strftime_now" not in source:
        return source
    written = "".join(f"|replace({d!r}, {DATE.strftime(d)!r})" for d in DIRECTIVES)
    return f"{{% macro strftime_now(format) -%}}{{{{ format{written} }}}}{{%- endmacro %}}{source}"


def _of_end(turn: Turn, key: str) -> bool:
    """Whether a field of an answer says that it goes on, or that it does not."""
    return turn["role"] == "assistant" and says_unfinished(key, turn[key]) is not None


def unfinished(turns: Sequence[Turn]) -> list[int]:
    """Numbers of the answers that say that they go on."""
    return [number for number, turn in enumerate(turns) if is_unfinished(turn)]


def _says(value: object) -> bool:
    """Whether a key's value tells something, as false and 0 do."""
    return value is not None and value not in ("", [], {})


def _parts_left_out(calls: Any) -> Iterator[tuple[str, Any]]:
    """Each call of several, and each argument, with the calls, or the one call, without it."""
    if isinstance(calls, Mapping):
        yield from _arguments_left_out(calls)
    for at, call in enumerate(calls if isinstance(calls, list) else []):
        before, after = calls[:at], calls[at + 1 :]
        if len(calls) > 1:
            yield f"call {at + 1}", [*before, *after]
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            for part, other in _arguments_left_out(function):
                yield f"{part} of call {at + 1}", [*before, {**call, "function": other}, *after]


def _arguments_left_out(function: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    told = function.get("arguments")
    if isinstance(told, Mapping):
        for name in (name for name, value in told.items() if value is not None):
            others = {key: value for key, value in told.items() if key != name}
            yield f"the argument {name!s:.40}", {**function, "arguments": others}
    elif told:
        yield "the arguments", {**function, "arguments": ""}


def _renamed(tool: Any) -> Any:
    """A tool under another name; an empty one in place of one that has none."""
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        return {}
    other = {**inner, "name": inner["name"] + PLACE}
    return {**tool, "function": other} if inner is not tool else other


def _num_shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _written(turn: str, content: str) -> int:
    """Length of a turn without the whitespace that only separates it from the next; where
    whitespace is all that ends the turn, it is part of it."""
    trimmed, content = turn.rstrip(), content.rstrip()
    ends_in_space = trimmed.endswith(content) if content else not trimmed
    return len(turn) if ends_in_space else len(trimmed)

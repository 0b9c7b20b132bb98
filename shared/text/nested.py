"""Lists within a row, be they JSON in a table: calls of a message, earlier turns of a prompt."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shared.errors import DataError
from shared.text.formats import as_string, kind_in_words

CALLS = (  # fields of a message
    *("tool_calls", "function_call", "tool_call", "function_calls", "toolCalls", "functionCall"),
    *("tool_use", "tool_uses"),
)
NO_CALL = frozenset(("", "null", "[]", "{}", "none", "nan", "false", "no", "0", "0.0", "n/a"))


def parsed_calls(more: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """Calls as chat templates expect them, where others write them or their arguments as JSON."""
    if "tool_calls" not in more:
        return more
    calls = from_json(more["tool_calls"], where, f"tool_calls of {name}")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"{where}: tool_calls of {name} is {kind_in_words(calls)}, not a list of objects"
        )
    return more | {"tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call and "name" in call:  # the inner object alone
        call = {"type": "function", "function": call}
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    with suppress(ValueError, RecursionError):
        parsed = json.loads(function["arguments"])
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return dict(call)


def from_json(value: object, where: str, name: str, *, opens: str = "[") -> Any:
    """A list, or what `opens` says, that a table holds as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith(opens):
        return None if value in ("", "null") else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is no JSON ({error}); repair it") from None


def calls_nothing(value: object) -> bool:
    """Whether a value holds no call, as that of a row without one in a table that has the column:
    nulls in every field, or the word for none or no."""
    if isinstance(value, str):
        return value.strip().lower() in NO_CALL
    if isinstance(value, Mapping):
        return all(map(calls_nothing, value.values()))
    return all(map(calls_nothing, value)) if isinstance(value, list) else not value


def history_in(history: object) -> list | None:
    """A row's history where it is a list that begins with a list, or is empty, be it as JSON in a
    table; None for another field of that name."""
    if isinstance(history, str) and history.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            history = json.loads(history)
    if not isinstance(history, list):
        return None
    return history if not history or isinstance(history[0], list | tuple) else None


def pairs_in(history: list, where: str) -> list[tuple[str, str]]:
    """What was asked and what was answered in each earlier turn. Raises DataError."""
    return [_pair(turn, number, where) for number, turn in enumerate(history, start=1)]


def _pair(turn: Any, number: int, where: str) -> tuple[str, str]:
    if not isinstance(turn, list | tuple) or len(turn) != 2:
        raise DataError(
            f"{where}: turn {number} of history is {turn!r:.40}, no pair of a prompt and its "
            "answer; correct it, or give the conversation as messages"
        )
    asked, answered = (as_string(text, where, f"turn {number} of history") for text in turn)
    return asked, answered

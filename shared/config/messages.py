"""From a validation error to a sentence: the option, the value, its place and the nearest match."""

import difflib
import re
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared.config.run import Config

Where = Callable[[tuple[str | int, ...]], str]

# What other tools call our options, where the words are not alike.
FAMILIAR = {
    "batch_size": "batch.rows_per_step",
    "epochs": "steps",
    "max_length": "data.context",
    "max_seq_length": "data.context",
    "num_gpus": "student.gpus",
    "output_dir": "paths.runs",
}


def explain(error: ValidationError, values: dict[str, Any], place: Where) -> str:
    """The sentence for the first problem; misspelt keys go first, since they cause the others."""
    problems = error.errors(include_url=False)
    rank = {"extra_forbidden": 0, "missing": 2}
    first = min(problems, key=lambda p: rank.get(p["type"], 1))
    problem = _innermost(first, problems, values)
    path, value = _located(problem, values)
    here = f"({place(path)})"
    name = ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        return f"{name} is not an option{_suggestion(path)} {here}"
    if problem["type"] == "missing":
        return f"{name} is required and not set {here}"
    if problem["type"].startswith("union_tag"):
        return _tag_message(problem, name) + f" {here}"
    there = [p for p in problems if _located(p, values)[0] == path]
    if ours := next((p for p in there if p["type"] == "value_error"), None):
        return " ".join(ours["msg"].removeprefix("Value error, ").splitlines()) + f" {here}"
    wanted = [p["msg"] for p in there]
    return f"{name} is {shown(value)}, but {_joined(wanted)} {here}"


@cache
def option_paths() -> tuple[str, ...]:
    """Every option of the config, `NAME` for a chosen name and `N` for a list index."""
    return tuple(dict.fromkeys(_options(Config, ())))


def _options(annotation: Any, path: tuple[str, ...]) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _options(field.annotation, (*path, name))
    elif _holds_model(annotation) and origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _options(argument, path)
    elif _holds_model(annotation) and origin in (list, dict):
        yield from _options(arguments[-1], (*path, "N" if origin is list else "NAME"))
    elif _holds_model(annotation):  # Annotated
        yield from _options(arguments[0], path)
    else:
        yield ".".join(path)


def _holds_model(annotation: Any) -> bool:
    if isinstance(annotation, type) and not get_args(annotation):
        return issubclass(annotation, BaseModel)
    return any(_holds_model(argument) for argument in get_args(annotation))


def _innermost(
    problem: ErrorDetails, problems: list[ErrorDetails], values: dict[str, Any]
) -> ErrorDetails:
    """What is wrong inside the same value, where another member of its union got that far."""
    path = _located(problem, values)[0]
    inside = [p for p in problems if _located(p, values)[0][: len(path)] == path]
    return max(inside, key=lambda p: len(_located(p, values)[0]))


def _located(problem: ErrorDetails, values: Any) -> tuple[tuple[str | int, ...], Any]:
    """The path in the file, without the names of union members, and the value there."""
    path: list[str | int] = []
    location = problem["loc"]
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(values, dict) and str(part) in values:
            path.append(part)
            values = values[str(part)]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            path.append(part)
            values = values[part]
        elif last and problem["type"] in ("missing", "extra_forbidden"):
            path.append(part)
    return tuple(path), values


def _suggestion(path: tuple[str | int, ...]) -> str:
    """The nearest option anywhere in the tree."""
    known = _known_with_names(path)
    written = ".".join(map(str, path))
    if written in known:
        return " with the kind chosen there; remove it"
    word = str(path[-1])
    likeness = {option: _likeness(written, option) for option in known}
    best = max(likeness, key=lambda option: likeness[option])
    if likeness[best] < 0.9 and word in FAMILIAR:
        return f". Did you mean {FAMILIAR[word]}?"
    if likeness[best] <= 0:
        return f"; options there are {', '.join(_siblings(written, known))}"
    return f". Did you mean {best}?"


def _known_with_names(path: tuple[str | int, ...]) -> list[str]:
    """All options and sections, with the names the user chose where the paths run together."""
    paths: dict[str, None] = {}
    for option in option_paths():
        parts = option.split(".")
        for i, part in enumerate(parts):
            agrees = [str(p) for p in path[:i]] == parts[:i]
            if part in ("NAME", "N") and agrees and i < len(path):
                parts[i] = str(path[i])
        for stop in range(1, len(parts) + 1):
            if parts[stop - 1] not in ("NAME", "N"):
                paths.setdefault(".".join(parts[:stop]))
    return list(paths)


def _likeness(written: str, known: str) -> float:
    """0 for no match; initials count (learning_rate, lr), and so does a common parent."""
    parent, _, word = written.rpartition(".")
    known_parent, _, known_word = known.rpartition(".")
    initials = "".join(part[:1] for part in word.split("_"))
    alike = 0.75 if initials == known_word else _ratio(word, known_word)
    needed = 0.55 if parent == known_parent else 0.7
    return alike + 0.2 * _ratio(parent, known_parent) if alike >= needed else 0.0


def _ratio(left: str, right: str) -> float:
    return 1.0 if left == right else difflib.SequenceMatcher(None, left, right).ratio()


def _siblings(written: str, known: list[str]) -> list[str]:
    parent = written.rpartition(".")[0]
    return [p.rpartition(".")[2] for p in known if p.rpartition(".")[0] == parent] or ["none"]


def _tag_message(problem: ErrorDetails, name: str) -> str:
    context = problem.get("ctx", {})
    tag_name = str(context.get("discriminator", "kind")).strip("'")
    if problem["type"] == "union_tag_not_found":
        return f"{name} needs {name}.{tag_name}, which says what it is"
    return (
        f"{name}.{tag_name} is {shown(context.get('tag'))}, which is none of "
        f"{context.get('expected_tags')}"
    )


def _joined(messages: list[str]) -> str:
    """Pydantic's demands on one value, in the words of YAML."""
    wanted = []
    for message in dict.fromkeys(messages):
        text = re.sub(r"^(Input|String|List|Dictionary|Value) should ", "it should ", message)
        text = re.sub(r" after validation, not \d+$", "", text)
        wanted.append(text.replace("valid array", "list").replace("an object", "a mapping"))
    return " or ".join(wanted).replace(" or it should be", " or")


def shown(value: Any) -> str:
    """A value as a sentence quotes it, shortened."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

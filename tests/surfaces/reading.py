"""What a test sets, found by reading its source: no config is made and no test is run."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from shared.config.messages import option_paths

SECTIONS = {option.partition(".")[0] for option in option_paths() if "." in option}
# Classes of sections that share names of options with others.
SECTION_CLASSES = {"Teacher": "teachers", "Student": "student", "HubDataset": "domains"}
ROOT = Path(__file__).resolve().parents[2]
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def is_set_by(test: str, option: str, *, defaults: list[Any]) -> bool:
    """Whether a test, `FILE::NAME` below `tests`, or anything of the tests' modules that it names,
    gives an option a value that is none of its defaults.

    An option is given as a keyword, as a key of a dictionary or as an override `a.b=c`, and not
    inside another section of a config than its own; values that only a run could tell count as
    another than the default.
    """
    return any(
        not any(_same(value, default) for default in defaults)
        for value in values_given(test, option)
    )


def values_given(test: str, option: str) -> Iterator[Any]:
    """Literals, or nodes where they are none, that a test gives an option."""
    leaf, section = option.removesuffix(".N").rpartition(".")[2], option.partition(".")[0]
    for node, inside in nodes_of(test):
        if inside not in ("", section):
            continue
        if isinstance(node, ast.keyword) and node.arg == leaf:
            yield _literal(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == leaf:
                    yield _literal(value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path, equals, value = node.value.partition("=")
            if equals and _names(path, option):
                yield value


def exists(test: str) -> bool:
    """Whether there is such a test."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and name.startswith("test_") and name in _definitions(path)


def is_drill(test: str) -> bool:
    """Whether a test, or its whole file, is left out of `make test`."""
    file, _, name = test.partition("::")
    definitions = _definitions(ROOT / "tests" / file)
    marks = [mark for found in definitions[name] for mark in getattr(found, "decorator_list", ())]
    return any(
        "mark.drill" in ast.unparse(node) for node in (*marks, *definitions.get("pytestmark", []))
    )


def nodes_of(test: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node of a test and of what it names, in its own module and in others of `tests`, and
    the section of a config that it is written in, "" for none."""
    file, _, name = test.partition("::")
    waiting, seen = [(ROOT / "tests" / file, name)], set()
    while waiting:
        path, name = waiting.pop()
        if (path, name) in seen:
            continue
        seen.add((path, name))
        for definition in _definitions(path).get(name, []):
            yield from _within(definition, "")
            for named in _names_in(definition):
                waiting.append(_imports(path).get(named, (path, named)))


def _within(node: ast.AST, section: str) -> Iterator[tuple[ast.AST, str]]:
    """A node and all below it, each with its section: the nearest that is named around it."""
    yield node, section
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            named = _section(key.value) if isinstance(key, ast.Constant) else ""
            yield from _within(value, named or section)
        return
    named = ""
    if isinstance(node, ast.keyword):
        named = _section(node.arg)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = _section(SECTION_CLASSES.get(node.func.id))
    for child in ast.iter_child_nodes(node):
        yield from _within(child, named or section)


def _section(name: Any) -> str:
    return name if isinstance(name, str) and name in SECTIONS else ""


def _same(value: Any, default: Any) -> bool:
    """As a config would read them: overrides are text, and a tuple is a list."""
    if isinstance(value, str) and not isinstance(default, str):
        return value in (str(default), str(default).lower(), "null" if default is None else "")
    as_list = [list(x) if isinstance(x, tuple) else x for x in (value, default)]
    return as_list[0] == as_list[1] and isinstance(value, bool) == isinstance(default, bool)


def _names(path: str, option: str) -> bool:
    """Whether a dotted path is an option's, names and indices chosen."""
    parts, asked = path.split("."), option.split(".")
    return len(parts) == len(asked) and all(
        part == wanted or wanted in ("NAME", "N") for part, wanted in zip(parts, asked, strict=True)
    )


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except ValueError:
        return node


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def _definitions(path: Path) -> dict[str, list[Definition]]:
    """What a module defines at its top, by name."""
    found: dict[str, list[Definition]] = {}
    for node in _module(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(node)  # type: ignore[arg-type]
    return found


@cache
def _imports(path: Path) -> dict[str, tuple[Path, str]]:
    """Names imported from other modules of `tests`: the module's file and the name there."""
    found = {}
    for node in _module(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
            for alias in node.names:
                module = ROOT / Path(*str(node.module).split(".")).with_suffix(".py")
                if module.is_file():
                    found[alias.asname or alias.name] = (module, alias.name)
    return found


def _names_in(definition: ast.AST) -> set[str]:
    """Names that are used, those of fixtures among them."""
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    return used | {node.arg for node in ast.walk(definition) if isinstance(node, ast.arg)}

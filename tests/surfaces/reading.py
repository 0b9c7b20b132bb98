"""What a test sets, found by reading its source: no config is made and no test is run."""

import ast
import types
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from shared.config.messages import option_paths
from shared.config.run import Config

ROOT = Path(__file__).resolve().parents[2]
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
Place = tuple[str, ...]  # names around a value, from the outside: those of a config, or ANY
Places = tuple[Place, ...]  # of a class that several sections are of
ANY = "*"
TAGS = {"kind", "policy", "method"}  # options that tell what a section is of
SECTIONS = {option.partition(".")[0] for option in option_paths() if "." in option}
SEGMENTS = {segment for option in option_paths() for segment in option.split(".")}


def _split(option: str) -> tuple[Place, str]:
    """The sections of an option and its own name; indices are left out."""
    *sections, leaf = [segment for segment in option.split(".") if segment != "N"]
    return tuple(sections), leaf


NAMED_ALIKE = Counter(_split(option)[1] for option in option_paths())


def is_set_by(test: str, option: str, *, defaults: list[Any]) -> bool:
    """Whether a test, `FILE::NAME` below `tests`, or anything of the tests' modules that it names,
    gives an option a value that is none of its defaults.

    An option is given as a keyword, as a key of a dictionary or as an override `a.b=c`: in its own
    section, which is told by the names around it, that of a variable among them, by the class that
    is called, if need be through a function, or by a tag beside it. One whose name no other option
    has may also stand in none. Values that only a run could tell count as another than the default.
    """
    return any(
        not any(_same(value, default) for default in defaults)
        for value in values_given(test, option)
    )


def values_given(test: str, option: str) -> Iterator[Any]:
    """Literals, or nodes where they are none, that a test gives an option."""
    leaf = _split(option)[1]
    for node, places in nodes_of(test):
        if isinstance(node, ast.keyword) and node.arg == leaf and _is_of(places, option):
            yield _literal(node.value)
        elif isinstance(node, ast.Dict):
            own = _told_by_kind(node, leaf) or places
            for key, value in zip(node.keys, node.values, strict=True):
                if _text(key) == leaf and _is_of(own, option):
                    yield _literal(value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path, equals, value = node.value.partition("=")
            if equals and _names(path, option):
                yield value


def _is_of(places: Places, option: str) -> bool:
    """Whether what stands in one of these places may be the option, by its sections."""
    sections, leaf = _split(option)
    if any(_ends(place, sections) for place in places):
        return True
    around = {segment for place in places for segment in place if segment in SECTIONS}
    alone = NAMED_ALIKE[leaf] == 1 or not sections
    return alone and around <= {*sections[:1]}


def _ends(place: Place, sections: Place) -> bool:
    """Whether a place is the last of an option's sections, at least one of them by its name."""
    pairs = list(zip(reversed(place), reversed(sections), strict=False))
    return any(one == other for one, other in pairs) and all(
        one in (other, ANY) or other == "NAME" for one, other in pairs
    )


@cache
def _classes() -> dict[str, tuple[type[BaseModel], Places]]:
    """The classes of sections, by name, with the sections that are of them."""
    found: dict[str, tuple[type[BaseModel], Places]] = {}
    for model, place in _sections(Config, ()):
        _, places = found.get(model.__name__, (model, ()))
        found[model.__name__] = model, (*places, place)
    return found


def _sections(annotation: Any, place: Place) -> Iterator[tuple[type[BaseModel], Place]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, place
        for name, field in annotation.model_fields.items():
            yield from _sections(field.annotation, (*place, name))
    elif origin is dict:
        yield from _sections(arguments[-1], (*place, "NAME"))
    elif origin in (Union, types.UnionType, list):
        for argument in arguments:
            yield from _sections(argument, place)
    elif arguments and hasattr(annotation, "__metadata__"):
        yield from _sections(arguments[0], place)


def _told_by_kind(node: ast.Dict, leaf: str) -> Places:
    """The sections of a dictionary that says its tag; none where it does not."""
    said = {_text(key): _text(value) for key, value in zip(node.keys, node.values, strict=True)}
    told = ((tag, said[tag]) for tag in TAGS if said.get(tag))
    return tuple(place for one in told for place in _kinds().get((*one, leaf), ()))


@cache
def _kinds() -> dict[tuple[str, Any, str], Places]:
    """The sections of an option that stands beside a tag of some value."""
    found: dict[tuple[str, Any, str], Places] = {}
    for model, places in _classes().values():
        for tag in TAGS & set(model.model_fields):
            for value in get_args(model.model_fields[tag].annotation):
                for leaf in model.model_fields:
                    found[tag, value, leaf] = (*found.get((tag, value, leaf), ()), *places)
    return found


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


@cache
def nodes_of(test: str) -> tuple[tuple[ast.AST, Places], ...]:
    """Every node of a test and of what it names, in its own module and in others of `tests`, and
    where it stands in a config; cases that are drills are left out."""
    file, _, name = test.partition("::")
    waiting, seen = [(ROOT / "tests" / file, name)], dict[tuple[Path, str], list[Definition]]()
    while waiting:
        path, name = waiting.pop()
        if (path, name) in seen:
            continue
        seen[path, name] = _definitions(path).get(name, [])
        for named in {one for node in seen[path, name] for one in _names_in(node)}:
            waiting.append(_imports(path).get(named, (path, named)))
    shown = _Shown()
    for definition in (node for found in seen.values() for node in found):
        shown.look(definition)
    return tuple(
        found
        for (path, _), definitions in seen.items()
        for definition in definitions
        for found in _within(shown.visit(deepcopy(definition)), path, ((),))
    )


class _Shown(ast.NodeTransformer):
    """Leaves out the cases that are drills: of `telling`, also where a constant holds the cases by
    name, and those that are marked."""

    def __init__(self) -> None:
        self._of: dict[str, set[Any]] = {}  # the constants that hold cases, and what is shown

    def look(self, definition: ast.AST) -> None:
        """See which cases of constants a definition shows."""
        for node in ast.walk(definition):
            if _is_telling(node) and isinstance(node.args[0], ast.Name):
                named = map(_text, node.args[1:])
                self._of.setdefault(node.args[0].id, set()).update(named)

    def visit_Call(self, node: ast.Call) -> ast.AST | None:
        marks = [keyword.value for keyword in node.keywords if keyword.arg == "marks"]
        if any("mark.drill" in ast.unparse(mark) for mark in marks):
            return None
        if _is_telling(node):
            node = ast.Tuple(node.args[1:])  # type: ignore[assignment]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self._cases(node, node.targets[0])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self._cases(node, node.target)

    def _cases(self, node: ast.Assign | ast.AnnAssign, name: ast.expr) -> ast.AST:
        value = node.value
        if isinstance(name, ast.Name) and isinstance(value, ast.Dict) and name.id in self._of:
            pairs = list(zip(value.keys, value.values, strict=True))
            pairs = [pair for pair in pairs if _text(pair[0]) in self._of[name.id]]
            node.value = ast.Dict([key for key, _ in pairs], [one for _, one in pairs])
        return self.generic_visit(node)


def _is_telling(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "telling"


def _within(node: ast.AST, path: Path, places: Places) -> Iterator[tuple[ast.AST, Places]]:
    """A node of a module and all below it, each with its places."""
    if isinstance(node, ast.Call):
        places = _called(node, path) or places
    yield node, places
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            named = places if key is None else _below(places, _text(key))
            yield from _within(value, path, named)
        return
    if isinstance(node, ast.DictComp | ast.keyword):
        places = _below(places, node.arg if isinstance(node, ast.keyword) else None)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id.lower() in SEGMENTS:
            places = (*places, (target.id.lower(),))
    for child in ast.iter_child_nodes(node):
        yield from _within(child, path, places)


def _called(node: ast.Call, path: Path) -> Places:
    """The sections that the keywords of a call are of: those of its class, which is called itself
    or by a method of its own, or those that a function of the tests passes them on to."""
    named = node.func.value if isinstance(node.func, ast.Attribute) else node.func
    if not isinstance(named, ast.Name):
        return ()
    if named.id in _classes():
        return _classes()[named.id][1]
    if named is not node.func:
        return ()
    return _passed_on(*_imports(path).get(named.id, (path, named.id)))


@cache
def _passed_on(path: Path, name: str) -> Places:
    """The places in a function at which its `**keywords` stand."""
    found: list[Place] = []
    for function in _definitions(path).get(name, []):
        if not isinstance(function, ast.FunctionDef) or function.args.kwarg is None:
            continue
        keywords = function.args.kwarg.arg
        for statement in function.body:
            for node, places in _within(statement, path, ((),)):
                if any(isinstance(one, ast.Name) and one.id == keywords for one in _spread(node)):
                    found.extend(place for place in places if place)
    return tuple(found)


def _spread(node: ast.AST) -> list[ast.expr]:
    """What a dictionary, a call or a union of dictionaries takes as a whole."""
    if isinstance(node, ast.Dict):
        return [value for key, value in zip(node.keys, node.values, strict=True) if key is None]
    if isinstance(node, ast.Call):
        return [keyword.value for keyword in node.keywords if keyword.arg is None]
    return [node.left, node.right] if isinstance(node, ast.BinOp) else []


def _below(places: Places, name: str | None) -> Places:
    """Names that no config has stand for any."""
    return tuple((*place, name if name in SEGMENTS else ANY) for place in places)  # type: ignore[misc]


def _text(node: ast.AST | None) -> str | None:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if constant else None  # type: ignore[union-attr]


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

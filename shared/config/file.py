"""Configs as files: strict YAML, overrides, suggestions for misspelt keys, absolute paths.

Every message names the option, the value, and the file and line it came from.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shared.config.messages import Where, explain, shown
from shared.config.paths import resolve
from shared.config.run import Config
from shared.errors import ConfigError

__all__ = ["ConfigFile", "dump", "in_stages", "load_config", "read_file", "resolve"]

Value = Any  # what YAML can say: None, bool, int, float, str, list, dict
Path_ = tuple[str | int, ...]


def dotted(path: Iterable[str | int]) -> str:
    """`a.b.0` of a path."""
    return ".".join(str(part) for part in path)


class StrictLoader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, 1e-5 is a number and dates are text."""


StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"null|Null|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
        "-+.0123456789",
    ),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The values of a config before validation, and where each one was written."""

    values: dict[str, Value]
    origins: Mapping[Path_, str]  # path -> "file.yaml, line 14" or "the command line"
    source: str

    def origin(self, path: Path_) -> str:
        """Where a value, a part of it, or the nearest part around it was written."""
        if path in self.origins:
            return self.origins[path]
        inside = [p for p in self.origins if path and p[: len(path)] == path]
        if inside or not path:
            return self.origins[inside[0]] if inside else self.source
        return self.origin(path[:-1])


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a config; `overrides` are of the form `a.b=c`.

    Raises ConfigError, naming the option, the value, the file and the line.
    """
    file = read_file(path)
    for override in overrides:
        file = _overridden(file, override)
    config = _validated(file.values, file.origin)
    in_stages(config, file.origin)
    return config


def in_stages(config: Config, place: Where = dotted) -> dict[str, Config]:
    """The config of each stage of a run, by its name: that of the stage before it, at first of the
    run, with the stage's own options. Raises ConfigError; `place` says where a value was written.
    """
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"stages"})
    found = {}
    for name, options in config.stages.items():
        for option, value in options.items():
            values = _with(values, _path(option), value, where=f"stages.{name}")
        found[name] = _validated(values, partial(_place_in_stage, name, options, place))
    return found


def _place_in_stage(name: str, options: Iterable[str], place: Where, path: Path_) -> str:
    """Where a value of a stage's config was written, as far as the stage itself says it."""
    told = [o for o in options if all(a == b for a, b in zip(_path(o), path, strict=False))]
    return f"stage {name}, {place(('stages', name, *told[:1]) if path else ('stages', name))}"


def _validated(values: dict[str, Value], place: Where) -> Config:
    try:
        # JSON is validated strictly: no string passes for a number, no boolean for an integer.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, values, place)) from None


def read_file(path: Path) -> ConfigFile:
    """The values of a YAML file; refuses a key that is written twice."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        if isinstance(error, FileNotFoundError):
            reason += f"; `tutelage init {path}` writes a first one"
        raise ConfigError(f"the config {path} cannot be read: {reason}") from None
    origins: dict[Path_, str] = {}
    try:
        values = _parsed(text, where=str(path), origins=origins)
    except RecursionError:
        raise ConfigError(
            f"the config {path} is nested without end or too deeply; write its values plainly"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"the config {path} holds no options; `tutelage init` writes a first one")
    return ConfigFile(values, origins, str(path))


def dump(config: Config) -> str:
    """The config as YAML, every option spelt out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parsed(text: str, *, where: str, origins: dict[Path_, str]) -> Value:
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}") from None
    return None if node is None else _built(loader, node, where=where, path=(), origins=origins)


def _built(
    loader: StrictLoader, node: yaml.Node, *, where: str, path: Path_, origins: dict[Path_, str]
) -> Value:
    """Plain values of a YAML node; fills `origins` on the way."""
    place = f"{where}, line {node.start_mark.line + 1}"
    if path:
        origins.setdefault(path, place)
    if isinstance(node, yaml.SequenceNode):
        return [
            _built(loader, child, where=where, path=(*path, i), origins=origins)
            for i, child in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, place)
    values: dict[str, Value] = {}
    for key_node, child in node.value:
        key, line = str(key_node.value), f"{where}, line {key_node.start_mark.line + 1}"
        if not key or not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"an option's name is empty or no plain word; change it ({line})")
        if ":" in key and child.value == "" and isinstance(child, yaml.ScalarNode):
            apart = key.replace(":", ": ", 1)
            raise ConfigError(f"{key} has no space after its colon; write {apart} ({line})")
        if key in values:
            raise ConfigError(f"{dotted((*path, key))} is written twice; remove one ({line})")
        origins[(*path, key)] = line
        values[key] = _built(loader, child, where=where, path=(*path, key), origins=origins)
    return values


def _scalar(loader: StrictLoader, node: yaml.Node, place: str) -> Value:
    try:
        value = loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise ConfigError(
            f"the tag {node.tag} is not allowed; write a plain value ({place})"
        ) from None
    except ValueError:  # of the interpreter, which bounds the digits that it converts
        raise ConfigError(
            f"{shown(node.value)} has too many digits for a number; write fewer ({place})"
        ) from None
    return value


def _overridden(file: ConfigFile, override: str) -> ConfigFile:
    """The file with one `a.b=c` applied; parts between are created, list items go by index."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"{override!r} is not an override; write one as option=value")
    path, where = _path(name), f"override {shown(override)}"
    if path[0] == "stages" and len(path) > 3:  # a stage's options have dotted names
        path = (*path[:2], ".".join(map(str, path[2:])))
    origins: dict[Path_, str] = {}
    value = _parsed(text, where=where, origins=origins)
    kept = {p: place for p, place in file.origins.items() if p[: len(path)] != path}
    values = _with(file.values, path, value, where=where)
    return ConfigFile(values, {**kept, path: where}, file.source)


def _path(name: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _with(values: Value, path: Path_, value: Value, *, where: str) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(values, list):
        if not isinstance(key, int) or key >= len(values):
            raise ConfigError(f"{key} is no index of that list of {len(values)} ({where})")
        return [_with(v, rest, value, where=where) if i == key else v for i, v in enumerate(values)]
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{values!r} has no option {key!r} ({where})")
    parts = values or {}
    return {**parts, str(key): _with(parts.get(str(key)), rest, value, where=where)}

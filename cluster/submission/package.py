"""The working folder as a job takes it along: which files, how large, as one zip."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What Ray itself reads .gitignore with.
from ray._private.thirdparty.pathspec.pathspec import PathSpec

from shared.config.paths import local_paths
from shared.config.run import Config
from shared.errors import ConfigError
from shared.in_words import in_bytes

LIMIT_BYTES = 100 * 10**6  # Ray takes 100 MiB, the zip's own lists included
IGNORE_FILES = (".gitignore", ".rayignore")
LEFT_OUT = (".git", ".venv", "venv", "__pycache__", "/runs/")
SHOWN = 3  # entries of a folder that is too large

Rules = tuple[tuple[str, list[Any]], ...]  # a folder and the patterns of its ignore files


@dataclass(frozen=True, slots=True)
class Package:
    """Files of a folder, by their path in it, with their sizes in bytes."""

    folder: Path
    files: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def in_words(self) -> str:
        """For a line on the terminal."""
        number = len(self.files)
        return f"{number:,} file{'s' * (number != 1)}, {in_bytes(self.size)} of {self.folder}"

    def write(self, to: Path) -> None:
        """Write them as a zip, the same bytes as long as no file changes."""
        with zipfile.ZipFile(
            to, "w", zipfile.ZIP_DEFLATED, compresslevel=1, strict_timestamps=False
        ) as archive:
            for name in self.files:
                archive.write(self.folder / name, name)


def package_of(folder: Path, config: Config) -> Package:
    """What a job takes along of a folder: not what its ignore files name, nor runs and caches.
    Raises ConfigError where that is more than Ray takes."""
    folder = folder.resolve()
    own = [_inside(folder, path) for path in (config.paths.runs, config.paths.cache)]
    left_out = [*LEFT_OUT, *(f"/{path}/" for path in own if path)]
    package = Package(folder, dict(_files(folder, "", (("", _patterns(left_out)),))))
    if package.size > LIMIT_BYTES:
        raise ConfigError(_too_large(package))
    return package


def refuse_left_behind(config: Config, package: Package) -> None:
    """Refuse a config with relative paths to what the job does not take along. Raises
    ConfigError."""
    for option, value, places in local_paths(config, base=package.folder):
        for place in places:
            name = _inside(package.folder, str(place))
            if name is None:
                raise ConfigError(
                    f"{option} is {value!r}, outside {package.folder}, which is all that the job "
                    "takes along; submit from a folder that holds it, or name its path on the "
                    "cluster"
                )
            if name not in package.files:
                raise ConfigError(
                    f"{option} is {value!r}, of which {name} is named in an ignore file, so that "
                    "the job does not take it along; take it out of the file, or name its path on "
                    "the cluster"
                )


def _files(folder: Path, prefix: str, rules: Rules) -> Iterator[tuple[str, int]]:
    """Paths and sizes below a folder, links followed, in order."""
    rules = (*rules, *_rules_of(folder, prefix))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            circular = entry.is_symlink() and folder.is_relative_to(os.path.realpath(entry.path))
            if not circular and not _ignored(f"{name}/", rules):
                yield from _files(Path(entry.path), f"{name}/", rules)
        elif entry.is_file() and not _ignored(name, rules):
            _refuse_unwritable(name)
            yield name, entry.stat().st_size


def _refuse_unwritable(name: str) -> None:
    """Refuse a name that no zip can hold. Raises ConfigError."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the file {name!r} has a name that is no UTF-8, which a job cannot take along; rename "
            "it, or name it in .gitignore"
        ) from None


def _rules_of(folder: Path, prefix: str) -> Rules:
    found = (folder / name for name in IGNORE_FILES)
    texts = (file.read_text("utf-8", "replace") for file in found if file.is_file())
    return tuple((prefix, _patterns(text.splitlines())) for text in texts)


def _patterns(lines: Iterable[str]) -> list[Any]:
    """Compiled patterns; lines that are none, as `!` alone, say nothing, as in git."""
    patterns: list[Any] = []
    for line in lines:
        with suppress(IndexError, ValueError):
            patterns += PathSpec.from_lines("gitwildmatch", [line]).patterns
    return [pattern for pattern in patterns if pattern.include is not None]


def _ignored(name: str, rules: Rules) -> bool:
    """Whether the last pattern that fits a path leaves it out; a folder's path ends with /."""
    for prefix, patterns in reversed(rules):
        for pattern in reversed(patterns):
            if pattern.regex.match(name.removeprefix(prefix)):
                return pattern.include
    return False


def _inside(folder: Path, path: str) -> str | None:
    """A path relative to the folder, None where it is the folder or lies outside."""
    whole = Path(os.path.normpath(folder / Path(path).expanduser()))
    return str(whole.relative_to(folder)) if folder in whole.parents else None


def _too_large(package: Package) -> str:
    sizes: Counter[str] = Counter()
    for name, size in package.files.items():
        sizes[name.partition("/")[0]] += size
    largest = ", ".join(f"{name} ({in_bytes(size)})" for name, size in sizes.most_common(SHOWN))
    return (
        f"{package.folder} has {in_bytes(package.size)} to take along, more than the "
        f"{in_bytes(LIMIT_BYTES)} that Ray takes; the largest are {largest}: name them in "
        f".gitignore, and in the config the paths that they have on the cluster"
    )

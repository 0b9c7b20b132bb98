"""Text that every machine with our dependencies has: where it lies and how it is read.

python is the standard library without its docstrings; reference is pydoc's topics and those
docstrings; mathematics is sympy's docstrings; cpp is torch's headers; legal is the licences of
the packages we need. Nothing is downloaded. Knows nothing about caps, splits and files written.
"""

import ast
import fnmatch
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from shared.errors import DataError

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "peft", "bitsandbytes")
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"),
    *("__pycache__", "lib2to3", "turtledemo", "ensurepip", "benchmarks"),
    "ops",  # torch/include/ATen/ops: thousands of generated headers, all alike
}
SITES = ("site-packages", "dist-packages")  # folders that packages are installed in
MIN_FILE_BYTES = 400
MIN_DOCSTRING_CHARS = 80
LICENCE_CHARS = 3_000

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
File = tuple[str, Path]  # a name that is the same on every machine, and where the file lies


@dataclass(frozen=True, slots=True)
class Document:
    """One text; `key` names where it comes from."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one domain, in an order shuffled by their names, and how to read them."""

    files: tuple[File, ...]
    read: Callable[[Iterable[File]], Iterator[Document]]


@cache
def find_sources() -> dict[str, Source]:
    """The domains, by name, looked for once in a process. Reads no file. Raises DataError where a
    package is not installed."""
    stdlib = _shuffled(_tree(Path(sysconfig.get_paths()["stdlib"]), "stdlib", "*.py"))
    return {
        "python": Source(stdlib, _code),
        "reference": Source(stdlib, _reference),
        "mathematics": Source(_shuffled(_tree(_folder("sympy"), "sympy", "*.py")), _docstrings),
        "cpp": Source(_shuffled(_tree(_folder("torch") / "include", "torch", "*.h")), _headers),
        "legal": Source(_shuffled(_licence_files()), _licences),
    }


def package_versions() -> dict[str, str]:
    """The version of Python, of the packages we need, and of those they need."""
    versions = {name: metadata.version(name) for name in sorted(_closure(PACKAGES))}
    return {"python": sysconfig.get_python_version(), **versions}


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _shuffled(files: Iterable[File]) -> tuple[File, ...]:
    return tuple(sorted(files, key=lambda file: (fraction(file[0]), file)))


def _tree(folder: Path, name: str, pattern: str) -> Iterator[File]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [inner for inner in folders if inner not in SKIPPED_FOLDERS]
        for file in fnmatch.filter(files, pattern):
            path = Path(parent, file)
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


def _folder(package: str) -> Path:
    try:
        return Path(str(_installed(package).locate_file(package)))
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"the built-in corpus reads {package}, which is not installed; install it with "
            f"pip install {package}, or name your own text under domains:"
        ) from error


def _licence_files() -> Iterator[File]:
    """From each package's list of files, read as plain lines: torch's has thousands."""
    pattern = re.compile(r"^[^/,]+\.dist-info/([^,]*(?:licen[cs]e|copying|notice)[^/,]*),", re.I)
    for package in _closure(PACKAGES):
        found = _installed(package)
        for line in (found.read_text("RECORD") or "").splitlines():
            if match := pattern.match(line):
                path = Path(str(found.locate_file(line.split(",")[0])))
                if path.is_file():
                    yield f"{package}/{match[1]}", path


def _installed(name: str) -> metadata.Distribution:
    """A package as it was installed, and no copy that another one carries inside, which is found
    only where that one has been imported. Raises PackageNotFoundError."""
    for found in metadata.distributions(name=name):
        if not _is_inside_another(Path(str(found.locate_file(""))).parts):
            return found
    raise metadata.PackageNotFoundError(name)


def _is_inside_another(place: Sequence[str]) -> bool:
    """Whether the folder that a package is in, by the parts of its path, is another's."""
    return "_vendor" in place or (place[-1] not in SITES and any(part in SITES for part in place))


def _closure(roots: Iterable[str]) -> set[str]:
    """Installed packages that `roots` require, extras aside."""
    waiting, found = list(roots), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            required = _installed(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = (text for text in required if "extra ==" not in text)
        waiting += [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in plain]
    return found


def _code(files: Iterable[File]) -> Iterator[Document]:
    for key, text, tree in _parsed(files):
        lines = text.split("\n")
        for node in _documented(tree):
            first = node.body[0] if len(node.body) > 1 else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstring = slice(first.lineno - 1, first.end_lineno)
                lines[docstring] = ["\0"] * len(lines[docstring])
        yield Document(key, "\n".join(line for line in lines if line != "\0"))


def _reference(files: Iterable[File]) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics, key=fraction):
        yield Document(f"topics/{name}", topics[name])
    yield from _docstrings(files)


def _docstrings(files: Iterable[File]) -> Iterator[Document]:
    """One document per file: its longer docstrings."""
    for key, _, tree in _parsed(files):
        found = [ast.get_docstring(node) or "" for node in _documented(tree)]
        yield Document(key, "\n\n\n".join(t for t in found if len(t) > MIN_DOCSTRING_CHARS))


def _headers(files: Iterable[File]) -> Iterator[Document]:
    for key, path in files:
        yield Document(key, path.read_text("utf-8", errors="ignore"))


def _licences(files: Iterable[File]) -> Iterator[Document]:
    """Paragraphs that no earlier licence had, joined to documents: most licences are the same
    few, and the longest files are collections of licences."""
    seen: set[str] = set()
    for key, path in files:
        kept = [""]
        for paragraph in re.split(r"\n\s*\n", path.read_text("utf-8", errors="ignore")):
            normal = " ".join(re.findall(r"[a-z]+", paragraph.lower()))
            if normal and normal not in seen:
                seen.add(normal)
                kept[-1] += inspect.cleandoc(paragraph) + "\n\n"
                kept += [""] * (len(kept[-1]) > LICENCE_CHARS)
        yield from (Document(f"{key}#{number}", text) for number, text in enumerate(kept))


def _parsed(files: Iterable[File]) -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and syntax tree of the files that are Python of this version."""
    for key, path in files:
        if path.stat().st_size < MIN_FILE_BYTES:
            continue
        try:
            text = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                yield key, text, ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue


def _documented(tree: ast.Module) -> list[Documented]:
    """The module, its classes and functions, and theirs; outer ones first."""
    found: list[Documented] = [tree]
    for node in found:
        found += [inner for inner in node.body if isinstance(inner, Documented)]
    return found

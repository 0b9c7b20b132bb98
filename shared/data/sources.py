"""Where text comes from: files, folders, globs and Hugging Face datasets, read as documents.

A row is `{"text"}`, `{"prompt", "response"}` or `{"messages": [{"role", "content"}, ...]}`.
This module does not know tokenizers. Every defect is a DataError that names file and line.
"""

import difflib
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from shared.config.run import Domain, HubDataset, Source
from shared.data.digests import digest_file
from shared.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Field = Literal["text", "prompt", "response", "messages"]
Columns = Mapping[Field, str]
FIELDS: tuple[Field, ...] = ("text", "prompt", "response", "messages")
UNREAD_TABLES = (".json", ".csv", ".tsv", ".gz", ".zst", ".arrow")
HALF_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a source; the fields of its kind are filled."""

    kind: Literal["text", "pair", "messages"]
    where: str  # file:line
    text: str = ""
    prompt: str = ""
    response: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def strings(self) -> tuple[str, ...]:
        """The content, by which two documents are the same."""
        turns = (part for m in self.messages for part in (m.role, m.content))
        return (self.kind, self.text, self.prompt, self.response, *turns)


def sources_of(domain: Domain, split: Literal["train", "validation"]) -> list[Source]:
    """The sources of a split; empty where the domain names no validation text."""
    sources = getattr(domain, split)
    if sources is None:
        return []
    return sources if isinstance(sources, list) else [sources]


def read_documents(
    sources: Sequence[Source], *, root: Path, columns: Columns
) -> Iterator[Document]:
    """Documents of all sources, in a fixed order.

    `columns` maps our field names to those of the source. Raises DataError for a missing source,
    a row that is no JSON, has none of the fields or a field of the wrong type, or is not UTF-8.
    """
    for source in sources:
        if isinstance(source, HubDataset):
            yield from _read_hub(source, root, columns)
            continue
        for path in source_files(source, root=root):
            yield from _read_file(path, columns)


def digest_sources(sources: Sequence[Source], *, root: Path) -> list[str]:
    """One digest per file over its bytes and type, or of a dataset's own fingerprint."""
    digests = []
    for source in sources:
        if isinstance(source, HubDataset):
            digests.append(f"dataset:{_load_hub(source, root)._fingerprint}")
        else:
            files = source_files(source, root=root)
            digests += [f"{path.suffix}:{digest_file(path)}" for path in files]
    return digests


def num_bytes(sources: Sequence[Source], *, root: Path) -> int | None:
    """Size of all source files; None where it says little about the text (datasets, Parquet)."""
    if any(isinstance(source, HubDataset) for source in sources):
        return None
    files = [p for s in sources if isinstance(s, str) for p in source_files(s, root=root)]
    if any(path.suffix == ".parquet" for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def source_files(source: str, *, root: Path) -> list[Path]:
    """The files a string source stands for, sorted; hidden files of a folder are left out."""
    path = root / Path(source).expanduser()
    if path.is_file():
        if path.suffix in UNREAD_TABLES:
            raise DataError(
                f"{path} is a {path.suffix} file; rows are read from .jsonl and .parquet, "
                "convert it first"
            )
        return [path]
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        found = sorted(p for p in visible if p.is_file())
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [p for p in found if p.is_file()]
    if not found:
        raise DataError(_missing(path))
    return found


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder without files; name one with .jsonl, .parquet or text files"
    parent = path.parent
    wanted = path.name
    while not parent.is_dir():
        wanted, parent = parent.name, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
    what = "matches no file" if glob.has_magic(str(path)) else "does not exist"
    return f"{path} {what}; {parent} has {', '.join(near) if near else 'nothing in it'}"


def _read_file(path: Path, columns: Columns) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, columns)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, columns)
    else:
        yield Document("text", f"{path}:1", text=_decoded(path.read_bytes(), str(path)))


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is no JSON ({error.msg} at column {error.colno}); "
                    "a .jsonl file has one object per line"
                ) from None
            except RecursionError:
                raise DataError(f"{where} is nested too deeply; flatten the row") from None
            yield _document(row, where, columns)


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [c for c in (columns.get(f, f) for f in FIELDS) if c in names]
        if not wanted:
            raise DataError(_no_fields(str(path), names))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield _document(row, f"{path}:{number}", columns)
    except pa.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not readable as Parquet ({first_line}); write it again"
        ) from None


def _read_hub(source: HubDataset, root: Path, columns: Columns) -> Iterator[Document]:
    for number, row in enumerate(_load_hub(source, root), start=1):
        yield _document(row, f"{source.dataset}[{source.split}]:{number}", columns)


def _load_hub(source: HubDataset, root: Path) -> "Dataset":
    from datasets import load_dataset, load_from_disk

    folder = root / Path(source.dataset).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return load_from_disk(str(folder))[source.split]  # type: ignore[index]
        if (folder / "state.json").is_file():
            return load_from_disk(str(folder))  # type: ignore[return-value]
        name = str(folder) if folder.exists() else source.dataset
        return load_dataset(name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"dataset {source.dataset!r}, split {source.split!r}, cannot be loaded "
            f"({reason[0].rstrip('.')}); check the name, the split and the network"
        ) from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte {raw[error.start]:#04x} at {error.start}); "
            "convert it, or name the text files by a glob"
        ) from None


def _document(row: object, where: str, columns: Columns) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {_kind(row)}, not an object with one of {_SHAPES}")
    found = {field: row.get(columns.get(field, field)) for field in FIELDS}
    if found["messages"] is not None:
        return Document("messages", where, messages=_messages(found["messages"], where))
    if found["prompt"] is not None and found["response"] is not None:
        prompt, response = (_string(found[f], where, f) for f in ("prompt", "response"))
        return Document("pair", where, prompt=prompt, response=response)
    if found["text"] is not None:
        return Document("text", where, text=_string(found["text"], where, "text"))
    raise DataError(_no_fields(where, [str(name) for name in row]))


_SHAPES = "text, prompt with response, or messages"


def _no_fields(where: str, names: Sequence[str]) -> str:
    has = f"it has {', '.join(names)}" if names else "it is empty"
    return f"{where} has no {_SHAPES}; {has}: name its fields under the domain's `columns`"


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: messages is {_kind(value)}, not a list of role and content")
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where}: message {number} is not an object with role and content")
        role, content = (
            _string(turn[key], where, f"{key} of message {number}") for key in ("role", "content")
        )
        messages.append(Message(role, content))
    return tuple(messages)


def _string(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {_kind(value)}, not a string; convert it")
    if not value.isascii() and HALF_SURROGATE.search(value):
        raise DataError(f"{where}: {field} holds half a surrogate pair, no valid text; repair it")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | bool | int | float):
        return f"{type(value).__name__} {value!r:.40}"
    return "an empty list" if value == [] else f"a {type(value).__name__}"

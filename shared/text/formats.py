"""Formats of files: what a name says of the content, and the rows or the text that it holds.

Names are read without regard to case. A file is rows (`.jsonl`, `.ndjson`, `.jsonlines`, `.json`,
`.csv`, `.tsv`, `.parquet`; all but Parquet also compressed) or, under any other name, one text.
Every defect is a DataError that names file and line.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DataError
from shared.loading import first_line

COMPRESSIONS = {
    **{".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"},
    **{".gzip": "gzip", ".zstd": "zstd"},
}
LINES, PARQUET = (".jsonl", ".ndjson", ".jsonlines"), (".parquet", ".pq")
TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# How programs write that a cell of a table is missing, beside leaving it empty.
MISSING = frozenset(("NaN", "nan", "NAN", "null", "NULL", "Null", "None", "<NA>", "\\N", "#N/A"))
ROWS = (*LINES, ".json", *TABLES, *PARQUET)
BEGINNINGS = {  # of files that are not what their names say
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed, as a name ending in .gz says",
    b"\x28\xb5\x2f\xfd": "compressed, as a name ending in .zst says",
    b"BZh": "compressed, as a name ending in .bz2 says",
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a .zip or Office file",
    b"%PDF-": "a PDF",
    b"{\\rtf": "RTF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
}
NO_TEXT = (b"PK\x03\x04", b"%PDF-", b"{\\rtf")  # even where their bytes are UTF-8
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

INVALID = re.compile("[\ud800-\udfff\ufdd0\ufdd1]")  # halves of pairs, and marks of our own

csv.field_size_limit(1 << 30)


def kind_of(path: Path) -> str:
    """The suffixes that say how a file is read, in lower case; its own where it is one text."""
    format_, compression = suffixes_of(path)
    return format_ + compression if compression or format_ in ROWS else path.suffix


def is_text(path: Path) -> bool:
    """Whether a file is one text, not rows."""
    format_, _ = suffixes_of(path)
    return format_ not in ROWS


def size_of_text(path: Path) -> int | None:
    """Bytes, about as many as the text has; None where the file's size says little."""
    format_, compression = suffixes_of(path)
    return None if compression or format_ in PARQUET else path.stat().st_size


def suffixes_of(path: Path) -> tuple[str, str]:
    """The suffixes of format and compression in lower case, each "" where a name has none."""
    found = [suffix.lower() for suffix in path.suffixes]
    compression = found.pop() if found and found[-1] in COMPRESSIONS else ""
    return found[-1] if found else "", compression


def read_text(path: Path) -> str:
    """A file that is one text. Raises DataError where it is not UTF-8, or rows by its content."""
    raw = b"".join(_lines(path))
    if raw.startswith(NO_TEXT):
        raise DataError(
            f"{path} is no text ({_what_it_is(raw)}); convert it, or name the text files by a glob"
        )
    text = decoded(raw, str(path))
    if found := re.search("[\ufdd0\ufdd1]", text):
        raise DataError(
            f"{path} holds U+{ord(found[0]):04X}, which is no character of a text; convert it, or "
            "name the text files by a glob"
        )
    _refuse_rows_as_text(path, text)
    return text


def read_rows(path: Path, *, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Place (`file:line`, for Parquet and JSON arrays `file:row`) and content of every row.

    Of a Parquet file only the `wanted` columns are read; each other one is None. Raises DataError.
    """
    format_, _ = suffixes_of(path)
    if format_ in PARQUET:
        yield from _parquet_rows(path, wanted)
    elif format_ in LINES:
        yield from _json_lines(_lines(path), path)
    elif format_ == ".json":
        yield from _json_rows(path, wanted)
    else:
        yield from _table_rows(path, format_)


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark. Raises DataError."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = _what_it_is(raw) or (
            f"byte {raw[error.start]:#04x} at {error.start}, which Latin-1 and Windows-1252 have"
        )
    else:
        if "\0" not in text:
            return text
        reason = _what_it_is(raw) or "it holds zero bytes, as binary files do"
    way_out = "convert it, as `iconv -f ENCODING -t UTF-8` does"
    if "compressed" in reason:
        way_out = "rename it so"
    raise DataError(f"{where} is not UTF-8 ({reason}); {way_out}, or name the text files by a glob")


def as_string(value: object, where: str, field: str) -> str:
    """A string that is valid text. Raises DataError for anything else, named `field`."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {kind_in_words(value)}, not a string; convert it")
    if not value.isascii() and (found := INVALID.search(value)):
        is_half = found[0] < "\ue000"
        what = "half a surrogate pair" if is_half else f"U+{ord(found[0]):X}, which is no character"
        raise DataError(f"{where}: {field} holds {what}, no valid text; repair it")
    return value


def kind_in_words(value: object) -> str:
    """What a field holds that it should not, for the middle of a sentence."""
    if value is None:
        return "null"
    if isinstance(value, str | bool | int | float):
        return f"{type(value).__name__} {value!r:.40}"
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _what_it_is(raw: bytes) -> str | None:
    """What bytes that are no UTF-8 begin like, or are by their zeros."""
    found = next((what for mark, what in BEGINNINGS.items() if raw.startswith(mark)), None)
    if found is not None:
        return f"it is {found}"
    for unit, name in ((4, "UTF-32"), (2, "UTF-16")):
        head = raw[: len(raw) // unit * unit][:4096]
        zeros = max(head[at::unit].count(0) for at in range(unit)) if head else 0
        if zeros > len(head) // unit // 2 and head.count(0) > 0.8 * len(head) * (unit - 1) / unit:
            return f"it is {name} without a mark, by its zero bytes"
    return None


def _refuse_rows_as_text(path: Path, text: str) -> None:
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return
    line = text.partition("\n")[0]
    if any(_is_of_rows(one) for one in (line, text)):
        raise DataError(
            f"{path} holds JSON rows under the name of a text; rename it to end in "
            f".jsonl{suffixes_of(path)[1]}"
        )


def _is_of_rows(text: str) -> bool:
    """Whether a text is a JSON object or an array of them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict)


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, decompressed. Raises DataError for a damaged one."""
    try:
        with _opened(path) as file:
            first = file.readline()
            if first.startswith(LFS_POINTER):
                raise DataError(_pointer(path))
            yield first
            yield from file
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); write it again") from None


def _pointer(path: Path) -> str:
    return f"{path} is a pointer of Git LFS in place of the data; run `git lfs pull` in its folder"


def _opened(path: Path) -> io.BufferedIOBase:
    _, compression = suffixes_of(path)
    if not compression:
        return path.open("rb")
    stream = pa.CompressedInputStream(pa.OSFile(str(path)), COMPRESSIONS[compression])
    return io.BufferedReader(stream)  # type: ignore[arg-type]


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            text = decoded(line, where).rstrip("\r\n")
            more = "a .jsonl file has one object per line"
            if text.strip() in ("[", "{", "[{"):
                more += ", and what goes over several is named .json"
            yield where, _parsed(text, where, more)


def _json_rows(path: Path, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a list, of an object with one list of rows, or one row a line."""
    raw = b"".join(_lines(path))
    try:
        whole = json.loads(decoded(raw, str(path)), object_pairs_hook=_object)
    except _Twice as error:
        raise DataError(f"{path} has {error} twice; leave one of them out") from None
    except (ValueError, RecursionError):
        first = raw.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0].rstrip()
        if first.startswith(b"{") and first.endswith(b"}"):
            yield from _json_lines(raw.splitlines(), path)
            return
        whole = _parsed(decoded(raw, str(path)), str(path), "a .json file holds a list of rows")
    rows = whole
    if isinstance(whole, Mapping):
        found = whole if wanted & set(whole) else _list_in(whole, path)
        rows = [found] if isinstance(found, Mapping) else found
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows; write a list of objects, or .jsonl")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _list_in(whole: Mapping[str, Any], path: Path) -> Any:
    """The list of rows that an object has; the object itself where it has none."""
    lists = {name: value for name, value in whole.items() if _is_rows(value)}
    if len(lists) > 1:
        raise DataError(
            f"{path} holds several lists of rows, {', '.join(lists)}; write each into a file"
        )
    return next(iter(lists.values()), whole)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _parsed(text: str, where: str, more: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = error.msg.removesuffix(" at")
        raise DataError(
            f"{where} is no JSON ({what} at {line}column {error.colno}); {more}"
        ) from None
    except _Twice as error:
        raise DataError(f"{where} has {error} twice; leave one of them out") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; flatten the row") from None
    except ValueError:  # of the interpreter, which bounds the digits that it converts
        raise DataError(f"{where} has a number of too many digits; write it as a string") from None


class _Twice(Exception):
    """A key that an object has more than once."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(_twice([name for name, _ in pairs]))
    return found


def _twice(names: list[str]) -> str:
    """The first name that stands there before, quoted."""
    return repr(next(name for at, name in enumerate(names) if name in names[:at]))


def _table_rows(path: Path, format_: str) -> Iterator[tuple[str, Any]]:
    """Rows under a header; cells that programs write for missing ones are null."""
    lines = enumerate(_lines(path), start=1)
    text = (decoded(line, f"{path}:{number}") for number, line in lines)
    reader = csv.reader(text, delimiter=TABLES[format_], strict=True)
    try:
        names = next(reader, [])
        _refuse_header(names, path, format_)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(names):
                raise DataError(
                    f"{where} has {len(row)} cells under a header of {len(names)}; quote what "
                    "holds a separator or a line end"
                )
            if row:
                cells = (None if cell.strip() in MISSING else cell for cell in row)
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num} is no row of a table ({error}); write the file again"
        ) from None


def _refuse_header(names: list[str], path: Path, format_: str) -> None:
    """Refuse a header that other separators divide, or that gives two columns one name."""
    own, only = TABLES[format_], names[0] if len(names) == 1 else ""
    other = next((mark for mark in SEPARATORS if mark != own and mark in only), None)
    if other is not None:
        suffix = next((name for name, mark in TABLES.items() if mark == other), None)
        way_out = f"rename it to end in {suffix}" if suffix else f"write it with {SEPARATORS[own]}"
        raise DataError(
            f"{path} has {SEPARATORS[other]} between its columns where a {format_} file has "
            f"{SEPARATORS[own]}; {way_out}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path} has two columns named {_twice(names)}; rename one of them")


def _parquet_rows(path: Path, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        others = dict.fromkeys(name for name in names if name not in wanted)
        number = 0
        for batch in file.iter_batches(1024, columns=[n for n in names if n in wanted]):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", others | row
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if _is_pointer(path):
            raise DataError(_pointer(path)) from None
        raise DataError(
            f"{path} is not readable as Parquet ({first_line(error)}); write it again"
        ) from None


def _is_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
    return False

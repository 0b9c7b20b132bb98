"""Files of text: which ones a source stands for, what their names say of them, and their rows.

Names are read without regard to case. A file is rows (`.jsonl`, `.ndjson`, `.jsonlines`, `.json`,
`.csv`, `.tsv`, `.parquet`; all but Parquet also compressed) or, under any other name, one text,
unless its name is that of a data format which is not read.
"""

import csv
import difflib
import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
LINES, TABLES, PARQUET = (".jsonl", ".ndjson", ".jsonlines"), (".csv", ".tsv"), (".parquet", ".pq")
ROWS = (*LINES, ".json", *TABLES, *PARQUET)
READ = ".jsonl, .json, .csv, .parquet, each but the last also as .gz or .zst"
UNREAD = frozenset(
    (
        *(".arrow", ".feather", ".orc", ".avro", ".msgpack", ".tfrecord", ".xlsx", ".xls", ".ods"),
        *(".sqlite", ".sqlite3", ".db", ".duckdb", ".lmdb", ".mdb", ".h5", ".hdf5", ".npy", ".npz"),
        *(".mat", ".pkl", ".pickle", ".rds", ".sav", ".dta", ".pdf", ".doc", ".docx", ".odt"),
        *(".rtf", ".ppt", ".pptx", ".epub", ".mobi", ".zip", ".tar", ".tgz", ".7z", ".rar", ".xz"),
        *(".br", ".snappy", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
        *(".ico", ".mp3", ".wav", ".flac", ".ogg", ".mp4", ".avi", ".mov", ".webm", ".safetensors"),
        *(".bin", ".gguf", ".onnx", ".pt", ".pth", ".ckpt", ".so", ".dll", ".exe", ".whl", ".pyc"),
    )
)
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation)s?([-_ ][\w-]+)*"
    r"((\.[a-z]{2}([-_]\w+)?)?\.(txt|md|markdown|rst|html|cff))?"
    r"|_success|dataset_infos?\.json|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
BACKUPS = (
    "~",
    "#",
    ".bak",
    ".backup",
    ".orig",
    ".swp",
    ".swo",
    ".tmp",
    ".part",
    ".old",
    ".rej",
    ".lock",
)
SAVED = ("state.json", "dataset_dict.json")  # marks of a folder of `save_to_disk`
WIDE_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

csv.field_size_limit(1 << 30)


def source_files(source: str, *, root: Path) -> list[Path]:
    """The files a string source stands for, sorted.

    A folder's hidden files, those about it (a README, a licence) and backup copies are left out, as
    they are of a glob that does not name them. Raises DataError for what does not exist and for a
    file that cannot be read as text.
    """
    path = root / Path(source).expanduser()
    if path.is_file():
        found = [path]
    else:
        every = below(path)
        found = [file for file in every if not _left_out(file, path)]
        if every and not found:
            names = ", ".join(file.name for file in every[:3])
            raise DataError(f"{path} has nothing to learn from, only {names}; name a file of text")
    if not found:
        raise DataError(_missing(path))
    for file in found:
        _refuse_unread(file)
    return found


def left_out(source: str, *, root: Path) -> list[Path]:
    """Visible files of a folder or glob that are not read: about it, or backup copies."""
    path = root / Path(source).expanduser()
    return [] if path.is_file() else [f for f in below(path) if _left_out(f, path)]


def kind_of(path: Path) -> str:
    """The suffixes that say how a file is read, in lower case; its own where it is one text."""
    format_, compression = _suffixes(path)
    return format_ + compression if compression or format_ in ROWS else path.suffix


def is_text(path: Path) -> bool:
    """Whether a file is one text, not rows."""
    format_, _ = _suffixes(path)
    return format_ not in ROWS


def size_of_text(path: Path) -> int | None:
    """Bytes, about as many as the text has; None where the file's size says little."""
    format_, compression = _suffixes(path)
    return None if compression or format_ in PARQUET else path.stat().st_size


def read_text(path: Path) -> str:
    """A file that is one text. Raises DataError where it is not UTF-8, or rows by its content."""
    text = decoded(b"".join(_lines(path)), str(path))
    _refuse_rows_as_text(path, text)
    return text


def read_rows(path: Path, *, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Place (`file:line`, for Parquet and JSON arrays `file:row`) and content of every row.

    Of a Parquet file only the `wanted` columns are read; each other one is None. Raises DataError.
    """
    format_, _ = _suffixes(path)
    if format_ in PARQUET:
        yield from _parquet_rows(path, wanted)
    elif format_ in LINES:
        yield from _json_lines(_lines(path), path)
    elif format_ == ".json":
        yield from _json_rows(path)
    else:
        yield from _table_rows(path, "\t" if format_ == ".tsv" else ",")


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark. Raises DataError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = WIDE_ENCODINGS.get(raw[:2])
        reason = f"it is {wide}" if wide else f"byte {raw[error.start]:#04x} at {error.start}"
        raise DataError(
            f"{where} is not UTF-8 ({reason}); convert it, or name the text files by a glob"
        ) from None


def below(path: Path) -> list[Path]:
    """Visible files of a folder, or those that a glob matches, sorted."""
    if path.is_dir():
        _refuse_saved(path)
        inside = (p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        return sorted(p for p in inside if p.is_file())
    pattern = path.with_name(_any_case(path.name))
    found = (Path(p) for p in glob.glob(str(pattern), recursive=True))
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffixes of format and compression in lower case, each "" where a name has none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def _any_case(name: str) -> str:
    """A glob's last part with both cases of every letter of its suffixes."""
    stem, dot, suffixes = name.partition(".")
    if not glob.has_magic(name) or "[" in suffixes:
        return name
    both = (f"[{c.lower()}{c.upper()}]" if c.lower() != c.upper() else c for c in suffixes)
    return stem + dot + "".join(both)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _left_out(file: Path, source: Path) -> bool:
    """Whether a file is about the others or a backup, and the source, a glob, does not name it."""
    name, named = file.name.lower(), "" if source.is_dir() else source.name.lower()
    backup = next((suffix for suffix in BACKUPS if name.endswith(suffix)), None)
    if backup is not None:
        return not named.endswith(backup)
    about = ABOUT.fullmatch(name)
    return about is not None and not named.startswith(name[:4])


def _refuse_unread(file: Path) -> None:
    format_, compression = _suffixes(file)
    unread = format_ if format_ in UNREAD else ""
    if compression and format_ in PARQUET:
        unread = format_ + compression
    if unread:
        raise DataError(
            f"{file} is a {unread} file, which is not read; rows are read from {READ}: convert "
            "it first, or name the other files by a glob"
        )


def _refuse_saved(folder: Path) -> None:
    if any((folder / mark).is_file() for mark in SAVED):
        raise DataError(
            f"{folder} was written by `save_to_disk` of datasets; name it as a dataset: "
            f"{{dataset: {folder.name}}}, with `split` where it has several"
        )


def _refuse_rows_as_text(path: Path, text: str) -> None:
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return
    line = text.partition("\n")[0]
    if any(_is_of_rows(one) for one in (line, text)):
        raise DataError(
            f"{path} holds JSON rows under the name of a text; rename it to end in .jsonl"
        )


def _is_of_rows(text: str) -> bool:
    """Whether a text is a JSON object or an array of them."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder without files; name one with .jsonl, .parquet or text files"
    parent, wanted = path.parent, path.name
    while not parent.is_dir():
        wanted, parent = parent.name, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
    what = "matches no file" if glob.has_magic(str(path)) else "does not exist"
    return f"{path} {what}; {parent} has {', '.join(near) if near else 'nothing in it'}"


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, decompressed. Raises DataError for a damaged one."""
    try:
        with _opened(path) as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); write it again") from None


def _opened(path: Path) -> io.BufferedIOBase:
    _, compression = _suffixes(path)
    if not compression:
        return path.open("rb")
    stream = pa.CompressedInputStream(pa.OSFile(str(path)), COMPRESSIONS[compression])
    return io.BufferedReader(stream)  # type: ignore[arg-type]


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            more = "a .jsonl file has one object per line"
            yield where, _parsed(decoded(line, where), where, more)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a list, of an object with one list of rows, or one row a line."""
    raw = b"".join(_lines(path))
    try:
        whole = json.loads(decoded(raw, str(path)))
    except (ValueError, RecursionError):
        first = raw.lstrip().partition(b"\n")[0].rstrip()
        if first.startswith(b"{") and first.endswith(b"}"):
            yield from _json_lines(raw.splitlines(), path)
            return
        whole = _parsed(decoded(raw, str(path)), str(path), "a .json file holds a list of rows")
    rows = whole
    if isinstance(whole, Mapping):
        lists = [value for value in whole.values() if _is_rows(value)]
        rows = lists[0] if len(whole) == len(lists) == 1 else [whole]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows; write a list of objects, or .jsonl")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _parsed(text: str, where: str, more: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = error.msg.removesuffix(" at")
        raise DataError(
            f"{where} is no JSON ({what} at {line}column {error.colno}); {more}"
        ) from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; flatten the row") from None


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows under a header."""
    text = (decoded(line, str(path)) for line in _lines(path))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(names):
                raise DataError(
                    f"{where} has {len(row)} cells under a header of {len(names)}; quote what "
                    "holds a separator or a line end"
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num} is no row of a table ({error}); write the file again"
        ) from None


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
    except pa.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not readable as Parquet ({first_line}); write it again"
        ) from None

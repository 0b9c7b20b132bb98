"""Files of text: which ones a source stands for, and which lie beside them and are no data.

Names are read without regard to case, but for those that say what a file is in capitals alone.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shared.errors import DataError, reason_of
from shared.text.formats import PARQUET, suffixes_of

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
        *(".lzma", ".tbz2", ".txz", ".idx", ".ipynb", ".jsonlz4", ".xlsb", ".numbers", ".m4a"),
        *(".psv", ".ssv", ".dsv", ".tab", ".dbf", ".parq", ".jsonb", ".bson", ".sas7bdat", ".por"),
    )
)
_TEXT = r"((\.[a-z]{2}([-_]\w+)?)?\.(txt|md|markdown|rst|adoc|html|cff|bib))?"
_OF_DATA = r"((data|dataset|model|corpus)[-_ ])?"
_LICENCES = r"((mit|bsd|[al]?gpl|apache|mpl|cc|odc|third[-_ ]?party)[-_ ]?)?"
_MORE = r"([-_ ][\w-]+(\.\d+)*)*"
_SIGNED = r"(\.(txt|json|md5|sha\d+|asc|gpg|sig))*"
ABOUT = re.compile(
    "|".join(
        (
            rf"{_OF_DATA}(readme|changelog|contributing|citation|disclaimer)s?{_MORE}{_TEXT}",
            rf"{_OF_DATA}{_LICENCES}(licen[cs]e|copying|copyright|notice)s?{_MORE}{_TEXT}",
            rf"(attribution|acknowledge?ment|code[-_ ]of[-_ ]conduct|unlicense)s?{_TEXT}",
            rf"(data[-_ ]?sheet|(data|data[-_ ]?set|model)[-_ ]?card)s?{_MORE}{_TEXT}",
            rf"((md5|sha-?\d+|b2)[-_]?(check)?sums?|checksums?){_SIGNED}",
            r"(dataset[-_])?(infos?|dict|metadata|meta|stats|statistics|schema|manifest|config)\.json",
            r"(dataset[-_]infos?|metadata|meta|croissant([-_]\w+)?)\.(json|ya?ml|toml|xml)",
            r"_success|_metadata|_common_metadata|_(committed|started)_\w+",  # of Spark
            r"thumbs\.db|desktop\.ini",
        )
    ),
    re.IGNORECASE,
)
# Words that may name a text, but not in capitals.
ABOUT_IN_CAPITALS = re.compile(
    r"(AUTHORS|CONTRIBUTORS|MAINTAINERS|CREDITS|THANKS|CHANGES|HISTORY|NEWS|SECURITY|SUPPORT"
    r"|GOVERNANCE|INSTALL|VERSION|MANIFEST|PATENTS|CODEOWNERS|TODO|ROADMAP|ERRATA)"
    r"(\.(txt|md|markdown|rst|in|TXT|MD))?|(LICEN[CS]E|COPYING|NOTICE)[.][A-Z0-9.-]+"
)
FOLDERS_ABOUT = {"_delta_log", "_temporary", "_spark_metadata", "__MACOSX"}
# Ends of names: copies of editors, what is not whole yet, and what tells of another file.
BESIDE = (
    *("~", "#", ".bak", ".backup", ".orig", ".old", ".rej", ".swp", ".swo", ".tmp", ".temp"),
    *(".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2", ".lock"),
    *(".md5", ".sha", ".sha1", ".sha256", ".sha512", ".crc", ".sig", ".asc", ".dvc"),
    ":zone.identifier",
)
SAVED = SAVED_SPLIT, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`


def source_files(source: str, *, root: Path) -> list[Path]:
    """The files a string source stands for, sorted.

    A folder's hidden files, those about it (a README, a licence, checksums) and backup copies are
    left out, as they are of a glob that does not name them. Raises DataError for what does not
    exist and for a file that cannot be read as text.
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
    """Visible files of a folder or glob that are not read: about the data, or beside it."""
    path = root / Path(source).expanduser()
    return [] if path.is_file() else [f for f in below(path) if _left_out(f, path)]


def below(path: Path) -> list[Path]:
    """Visible files of a folder, or those that a glob matches, sorted; each once, whatever links
    lead to it. Raises DataError for a link to nothing."""
    if path.is_dir():
        _refuse_saved(path)
        found = [p for p in _walked(path) if not _hidden(p.relative_to(path))]
    else:
        folder = path.parent
        start = glob.escape(str(folder)) if folder.is_dir() else str(folder)
        pattern = os.path.join(start, _any_case(path.name))
        found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        found = [p for p in found if "__pycache__" not in p.parts]
    once = {os.path.realpath(file): file for file in sorted(found, reverse=True)}
    for real, link in once.items():
        if not os.path.exists(real):
            raise DataError(f"{link} is a link to nothing, {real}; mend or remove it")
    return sorted(file for real, file in once.items() if os.path.isfile(real))


def _walked(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links to folders too, each of which is entered once."""
    entered: set[Path] = set()
    for at, folders, files in os.walk(folder, onerror=_refuse_closed, followlinks=True):
        yield from (Path(at) / name for name in files)
        entered.add(Path(at).resolve())
        folders[:] = sorted(n for n in folders if (Path(at) / n).resolve() not in entered)


def _refuse_closed(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({reason_of(error)}); give it other rights")


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
    """Whether a file is no data, but about it or beside it, and the source, a glob, does not name
    it."""
    name, named = file.name.lower(), "" if source.is_dir() else source.name.lower()
    if FOLDERS_ABOUT & {*file.parent.parts} - {*source.parts}:
        return True
    beside = next((end for end in BESIDE if name.endswith(end)), None)
    if beside is not None:
        return not named.endswith(beside)
    about = ABOUT.fullmatch(name) or ABOUT_IN_CAPITALS.fullmatch(file.name)
    return about is not None and not named.startswith(name[:4])


def _refuse_unread(file: Path) -> None:
    format_, compression = suffixes_of(file)
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


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder without files; name one with .jsonl, .parquet or text files"
    if path.exists():
        return f"{path} is neither a file nor a folder; write its rows into a file"
    parent, wanted = path.parent, path.name
    while not parent.is_dir():
        wanted, parent = parent.name, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:3]
    what = "matches no file" if glob.has_magic(str(path)) else "does not exist"
    return f"{path} {what}; {parent} has {', '.join(near) if near else 'nothing in it'}"

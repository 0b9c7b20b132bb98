"""The embedded corpus: text of every domain, cleaned, deduplicated, split, capped and cached.

Where the text comes from is `cluster.builtin.sources`. Knows nothing about models and tokenizers.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from cluster.builtin.sources import Document, Source, find_sources, fraction, package_versions
from shared.errors import DataError
from shared.files import obey_umask

DOMAINS = ("python", "reference", "mathematics", "cpp", "legal")
FOLDER = "default"  # in the cache
VERSION = 1  # raised whenever the same files would give another text
MAX_BYTES = {"train": 1_000_000, "validation": 60_000}  # of one domain
MIN_TRAIN_BYTES = 60_000
VALIDATION_SHARE = 0.1
MAX_DOCUMENT_CHARS = 3_000
MAX_FILE_CHARS = 12_000  # so that a few long files do not fill a domain
MIN_DOCUMENT_CHARS = 200
SHINGLE_WORDS = 8
MAX_SEEN_SHARE = 0.3

Sides = dict[str, list[Document]]  # "train" and "validation"


def build_corpus(cache: Path) -> Path:
    """The folder `<cache>/default/<hash>`, with `<domain>.train.jsonl`, `<domain>.validation.jsonl`
    and `manifest.json` in its subfolder `corpus`; built on first use, under a lock, and renamed
    into place. The hash covers names and sizes of the files, the manifest the text itself.

    Raises DataError where a domain has too little text.
    """
    sources = find_sources()
    folder = corpus_folder(cache, sources)
    if not (folder / "corpus").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "corpus.lock"):
            if not (folder / "corpus").is_dir():
                _write_corpus(sources, folder / "corpus")
    return folder


def corpus_folder(cache: Path, sources: dict[str, Source] | None = None) -> Path:
    """Where `build_corpus` builds, from these sources or those of this Python."""
    return cache / FOLDER / fingerprint(sources or find_sources())


def is_built_in(path: str, cache: str) -> bool:
    """Whether a model or text of a resolved config is of the embedded default."""
    return Path(path).is_relative_to(Path(cache).expanduser().absolute() / FOLDER)


def fingerprint(sources: dict[str, Source]) -> str:
    """16 hex digits over the files' names and sizes; no file is read."""
    files = {file for source in sources.values() for file in source.files}
    listed = sorted((name, path.stat().st_size) for name, path in files)
    return hashlib.sha256(json.dumps([VERSION, MAX_BYTES, listed]).encode()).hexdigest()[:16]


def choose_documents(sources: dict[str, Source]) -> dict[str, Sides]:
    """Documents of each domain and side, up to their size, near-duplicates dropped over all.

    Raises DataError where a domain has too little text.
    """
    seen: set[int] = set()
    chosen = {}
    for name in DOMAINS:
        chosen[name] = _capped(_distinct(_pieces(sources[name]), seen))
        _refuse_too_little(name, chosen[name])
    return chosen


def is_validation(key: str) -> bool:
    """Whether a file's text is validation text; the same file falls alike in every domain."""
    return fraction(f"side:{key}") < VALIDATION_SHARE


def _write_corpus(sources: dict[str, Source], corpus: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=corpus.parent, prefix="corpus.partial."))
    try:
        state = hashlib.sha256()
        domains = {
            name: {
                side: _write_side(scratch / f"{name}.{side}.jsonl", documents, state)
                for side, documents in sides.items()
            }
            for name, sides in choose_documents(sources).items()
        }
        manifest = {"version": VERSION, "sha256": state.hexdigest(), "domains": domains}
        manifest |= {"packages": package_versions()}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        obey_umask(scratch)
        scratch.rename(corpus)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_side(path: Path, documents: list[Document], state: "hashlib._Hash") -> dict[str, int]:
    """Write one JSONL file; returns what the manifest says of it."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            line = json.dumps({"text": document.text}, ensure_ascii=False) + "\n"
            state.update(line.encode())
            file.write(line)
    return {"documents": len(documents), "bytes": path.stat().st_size}


def _refuse_too_little(name: str, sides: Sides) -> None:
    size = sum(len(document.text) for document in sides["train"])
    if size < MIN_TRAIN_BYTES or not sides["validation"]:
        raise DataError(
            f"this Python has {size:,} characters of text for the built-in domain {name}, "
            f"{MIN_TRAIN_BYTES:,} are needed; install a Python with its standard library's "
            "sources, or name your own text under domains:"
        )


def _capped(documents: Iterable[Document]) -> Sides:
    """Both sides, each up to its size, in an order shuffled by text; reads no further than
    needed."""
    sides: Sides = {"train": [], "validation": []}
    room = dict(MAX_BYTES)
    for document in documents:
        side = "validation" if is_validation(document.key) else "train"
        size = len(document.text.encode())
        if size <= room[side]:
            room[side] -= size
            sides[side].append(document)
        else:
            room[side] = 0
        if not any(room.values()):
            break
    return {side: sorted(kept, key=lambda d: fraction(d.text)) for side, kept in sides.items()}


def _pieces(source: Source) -> Iterator[Document]:
    """Cleaned documents, the long ones cut at line ends."""
    for document in source.read(source.files):
        text = document.text.replace("\r\n", "\n").expandtabs(4)[:MAX_FILE_CHARS]
        text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r" +\n", "\n", text)).strip()
        while len(text) > MIN_DOCUMENT_CHARS:
            cut = len(text)
            if cut > MAX_DOCUMENT_CHARS:
                cut = text.rfind("\n", 0, MAX_DOCUMENT_CHARS) + 1 or MAX_DOCUMENT_CHARS
            yield Document(document.key, text[:cut])
            text = text[cut:]


def _distinct(documents: Iterable[Document], seen: set[int]) -> Iterator[Document]:
    """Documents of which at most `MAX_SEEN_SHARE` stood in earlier ones, by 8-word shingles."""
    for document in documents:
        words = re.findall(r"\w+", document.text)
        starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
        shingles = {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in starts}
        if len(shingles & seen) <= MAX_SEEN_SHARE * len(shingles):
            seen |= shingles
            yield document

"""Where text comes from: files, folders, globs and Hugging Face datasets, read as documents.

This module does not know tokenizers. Every defect is a DataError that names file and line.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from shared.config.domains import Domain, HubDataset, Source
from shared.errors import DataError
from shared.loading import first_line
from shared.text.digests import digest_file
from shared.text.documents import Columns, Document, Kind, columns_read, document_of
from shared.text.files import SAVED, SAVED_SPLIT, SAVED_SPLITS, source_files
from shared.text.formats import PARQUET, is_text, kind_of, read_rows, read_text, size_of_text
from shared.text.masks import ROW_MASKS, row_is_left_out

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation"]
# Rows that are not read: by split, number in the order of `read_documents`, and reason.
LeftOut = Mapping[Split, Mapping[int, str]]


# A row as a document: the row, its place, and the domain's columns.
MakeDocument = Callable[[object, str, Columns], Document]
Silent = Callable[[], None]  # is told of each row that says that nothing of it is learnt


def nothing() -> None:
    """Of rows that are not counted."""


def sources_of(domain: Domain, split: Split) -> list[Source]:
    """The sources of a split; empty where the domain names no validation text."""
    sources = getattr(domain, split)
    if sources is None:
        return []
    return sources if isinstance(sources, list) else [sources]


def read_documents(
    sources: Sequence[Source],
    *,
    root: Path,
    columns: Columns,
    make: MakeDocument = document_of,
    silent: Silent = nothing,
) -> Iterator[Document]:
    """Documents of all sources, in a fixed order, each as `make` reads its row, without the rows
    that say that they are not learnt, of each of which `silent` is told.

    `columns` maps our field names to those of the source. Raises DataError for a missing source,
    a row that is no JSON, has none of the fields or a field of the wrong type, or is not UTF-8.
    """
    named = frozenset(columns.values())
    for where, row in _rows(sources, root, columns):
        if isinstance(row, Document):
            yield row if make is document_of else make({"text": row.text}, where, columns)
        elif row_is_left_out(row, named):
            silent()
        else:
            yield make(row, where, columns)


def kinds_of(domain: Domain, *, root: Path) -> Iterator[Kind]:
    """The kinds of a domain's documents, each once, reading no further than is asked for."""
    seen: set[Kind] = set()
    for source in (*sources_of(domain, "train"), *sources_of(domain, "validation")):
        for document in read_documents([source], root=root, columns=domain.columns):
            if document.kind not in seen:
                seen.add(document.kind)
                yield document.kind


def digest_sources(sources: Sequence[Source], *, root: Path) -> list[str]:
    """One digest per file over its bytes and type, or of a dataset's own fingerprint."""
    digests = []
    for source in sources:
        if isinstance(source, HubDataset):
            digests.append(f"dataset:{_load_hub(source, root)._fingerprint}")
        else:
            files = source_files(source, root=root)
            digests += [f"{kind_of(path)}:{digest_file(path)}" for path in files]
    return digests


def num_bytes(sources: Sequence[Source], *, root: Path) -> int | None:
    """Size of all source files; None where it says little about the text (datasets, Parquet,
    compressed files)."""
    if any(isinstance(source, HubDataset) for source in sources):
        return None
    files = [p for s in sources if isinstance(s, str) for p in source_files(s, root=root)]
    sizes = [size_of_text(path) for path in files]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _rows(sources: Sequence[Source], root: Path, columns: Columns) -> Iterator[tuple[str, object]]:
    """Places and rows of all sources; a file that is one text is a document already."""
    for source in sources:
        if isinstance(source, HubDataset):
            yield from _read_hub(source, root, columns)
            continue
        for path in source_files(source, root=root):
            yield from _read_file(path, columns)


def _read_file(path: Path, columns: Columns) -> Iterator[tuple[str, object]]:
    if is_text(path):
        yield f"{path}:1", Document("text", f"{path}:1", text=read_text(path))
        return
    nulls, wanted = kind_of(path).startswith(PARQUET), columns_read(columns)
    for where, row in read_rows(path, wanted=wanted | ROW_MASKS if nulls else wanted):
        yield where, _without_nulls(row) if nulls else row


def _read_hub(source: HubDataset, root: Path, columns: Columns) -> Iterator[tuple[str, object]]:
    """The fields that are read alone: images and sounds beside them would be decoded."""
    dataset, wanted = _load_hub(source, root), columns_read(columns) | ROW_MASKS
    others = {name: None for name in dataset.column_names if name not in wanted}
    read = [name for name in dataset.column_names if name in wanted]
    chosen = _undecoded(dataset.select_columns(read)) if read else None
    rows = itertools.repeat({}, len(dataset)) if chosen is None else chosen
    for number, row in enumerate(rows, start=1):
        where = f"{source.dataset}[{source.split}]:{number}"
        yield where, _without_nulls(others | row)  # type: ignore[operator]


def _undecoded(dataset: "Dataset") -> "Dataset":
    """The same with images as the bytes that they are encoded in."""
    from datasets import Image, List

    encoded = Image(decode=False)
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(encoded))
    return dataset


def _load_hub(source: HubDataset, root: Path) -> "Dataset":
    from datasets import load_dataset

    folder = root / Path(source.dataset).expanduser()
    is_saved = any((folder / mark).is_file() for mark in SAVED)
    try:
        if is_saved:
            return _saved(folder, source)
        name = str(folder) if folder.exists() else source.dataset
        return load_dataset(name, source.config, split=source.split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"dataset {source.dataset!r}, split {source.split!r}, cannot be loaded "
            f"({reason}); check the name, the split and the network"
        ) from None


def _saved(folder: Path, source: HubDataset) -> "Dataset":
    """What `save_to_disk` wrote of a split. Raises DataError for one that it does not have, for
    parts, revisions and configs, which it knows none of, and for one without a row."""
    from datasets import load_from_disk

    several = folder / SAVED_SPLITS
    splits = json.loads(several.read_text())["splits"] if several.is_file() else []
    told = {} if splits else json.loads((folder / SAVED_SPLIT).read_text())
    known = splits or [str(told.get("_split") or "train")]
    if not splits and source.split == "train":  # as where none is named
        known = ["train"]
    other = next((n for n in ("config", "revision") if getattr(source, n) is not None), None)
    if source.split not in known or other is not None:
        what = f"the {other} {getattr(source, other)!r}" if other else f"split {source.split!r}"
        raise DataError(
            f"dataset {source.dataset!r} was written by `save_to_disk`, which keeps whole splits "
            f"({', '.join(known)}) and nothing of {what}; name one of them, and no more"
        )
    part = folder / source.split if splits else folder
    if json.loads((part / SAVED_SPLIT).read_text()).get("_data_files") == []:
        raise DataError(
            f"dataset {source.dataset!r} was written by `save_to_disk` without a row in split "
            f"{source.split!r}; write it again with rows, or leave it out"
        )
    return cast("Dataset", load_from_disk(str(part)))


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of typed columns without the fields that are there for other rows' sake: a list of
    messages or tools has one type for all of them."""
    return {
        name: _stripped(value) if isinstance(value, list) else value for name, value in row.items()
    }


def _stripped(value: Any) -> Any:
    if isinstance(value, list):
        return [_stripped(one) for one in value]
    if isinstance(value, dict):
        return {name: _stripped(one) for name, one in value.items() if one is not None}
    return value

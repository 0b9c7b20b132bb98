"""What the teacher alone is shown before the documents of a domain, to each its own: privileged
context by row.

A document is known by its prompt, all tokens up to the first that is learnt, which is the same
where a model wrote the answer. What is shown lies in an Arrow file, a row for every prompt.

T tokens of a document
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shared.errors import DataError
from shared.prompts.prefix import DocumentOpenings, Opening
from shared.text.sources import Split

Splits = dict[Split, dict[int, str]]
LEFT_OUT = b"left_out"  # in a file's metadata: rows that are not read, JSON
COUNTS = b"counts"  # there too: what became of texts, JSON
SAME_PROMPT = "one prompt with other teacher_prompts"
BEYOND_TEACHER = "longer than the teacher's context"
SCHEMA = pa.schema(
    {
        "key": pa.binary(16),
        "where": pa.string(),  # file:line
        "plain_ids": pa.list_(pa.int32()),  # see `Opening`
        "shown_ids": pa.list_(pa.int32()),
        "prompt": pa.int32(),  # tokens of it
        "length": pa.int32(),  # tokens of the document
    }
)
FILES_KEPT = 64


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """What is shown with one row of a source."""

    where: str
    opening: Opening
    prompt_ids: np.ndarray  # int32
    length: int  # tokens of the document, as far as a row holds it
    place: tuple[Split, int] = ("train", 0)  # split, and number among its documents

    def needs(self, *, context: int, written: int) -> int:
        """Tokens that a teacher reads at most, where a model writes `written` after the prompt
        within the `context` of a student's row."""
        shown, plain = self.opening.shown_ids, self.opening.plain_ids
        whole = _whole(len(self.prompt_ids), self.length, context=context, written=written)
        return len(shown) - len(plain) + whole


@dataclass(frozen=True, slots=True)
class RowOpenings:
    """The openings of a domain's documents; satisfies `DocumentOpenings`. Read where it is used."""

    path: str
    longest: int  # tokens by which a document grows at most
    digest: str  # of what is shown with which prompt

    def of(self, ids_T: np.ndarray, mask_T: np.ndarray, name: str) -> Opening:
        """See `DocumentOpenings`. Raises DataError for a prompt that no row of the sources has."""
        table, line_of = _read(self.path)
        line = line_of.get(key_of(ids_T, mask_T))
        if line is None:
            raise DataError(
                f"row {name} holds a document whose prompt no row of the domain's sources has, so "
                "that nothing is known to show the teacher with it; remove paths.cache and run "
                "the same command again"
            )
        plain, shown_ids = (
            table.column(part)[line].values.to_numpy() for part in ("plain_ids", "shown_ids")
        )
        return Opening(plain, shown_ids)

    def to_json(self) -> Any:
        """See `DocumentOpenings`."""
        return asdict(self)


def openings_from_json(value: Any) -> DocumentOpenings:
    """The inverse of `DocumentOpenings.to_json`."""
    return RowOpenings(**value) if isinstance(value, dict) else Opening.from_lists(*value)


def key_of(ids_T: np.ndarray, mask_T: np.ndarray) -> bytes:
    """16 bytes over a document's tokens up to the first that is learnt, over all where none is."""
    learnt = np.flatnonzero(mask_T)
    stop = int(learnt[0]) + 1 if len(learnt) else len(ids_T)
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids_T[:stop], np.int32).tobytes())


def write_row_prompts(
    path: Path,
    prompts: Iterable[RowPrompt],
    left_out: Splits | None = None,
    *,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Write what is shown with the rows of a domain, and which rows are left out, to which those
    are added that share a prompt with one before and are shown something else. None: raises
    DataError for such rows. `counts` are kept beside."""
    kept: dict[bytes, RowPrompt] = {}
    for one in prompts:
        key = key_of(one.prompt_ids, np.zeros(0))
        first = kept.setdefault(key, one)
        if not np.array_equal(first.opening.shown_ids, one.opening.shown_ids):
            if left_out is None:
                raise DataError(
                    f"{first.where} and {one.where} have the same prompt and different "
                    "teacher_prompts, and the student cannot tell them apart; leave one of them "
                    "out, or set data.unfit=drop"
                )
            split, number = one.place
            left_out.setdefault(split, {})[number] = SAME_PROMPT
        elif one.length > first.length:
            kept[key] = one
    columns = {
        "key": list(kept),
        "where": [one.where for one in kept.values()],
        "plain_ids": [one.opening.plain_ids for one in kept.values()],
        "shown_ids": [one.opening.shown_ids for one in kept.values()],
        "prompt": [len(one.prompt_ids) for one in kept.values()],
        "length": [one.length for one in kept.values()],
    }
    beside = {LEFT_OUT: left_out or {}, COUNTS: dict(counts or {})}
    schema = SCHEMA.with_metadata({key: json.dumps(told) for key, told in beside.items()})
    table = pa.table(columns, schema=schema)
    draft = path.with_name(f".{path.name}.draft")
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    draft.replace(path)


def read_row_prompts(path: Path) -> RowOpenings:
    """The openings that a file of `write_row_prompts` holds. Raises OSError or pa.ArrowException
    for one that is damaged or not there."""
    table, _ = _read(str(path))
    longest, state = 0, xxhash.xxh3_128()
    names = ("key", "plain_ids", "shown_ids")
    for key, *parts in zip(*(table.column(name) for name in names), strict=True):
        plain, shown = (part.values.to_numpy() for part in parts)
        longest = max(longest, len(shown) - len(plain))
        state.update(key.as_py())
        for ids in (plain, shown):
            state.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return RowOpenings(str(path), longest=longest, digest=state.hexdigest())


def read_left_out(path: Path) -> Splits:
    """The rows that `write_row_prompts` was told, or found, to be left out."""
    table, _ = _read(str(path))
    told = json.loads(table.schema.metadata[LEFT_OUT])
    return {
        split: {int(number): reason for number, reason in rows.items()}
        for split, rows in told.items()
    }


def read_counts(path: Path) -> dict[str, int]:
    """The counts that `write_row_prompts` was told."""
    table, _ = _read(str(path))
    return json.loads(table.schema.metadata[COUNTS])


def overlong(
    openings: RowOpenings, *, teacher_context: int, context: int, written: int
) -> tuple[str, int] | None:
    """The first row that the teacher cannot read whole, and how many tokens it would have; None
    where it reads all. `written` is how many tokens a model may write after a prompt, within the
    `context` of a student's row."""
    table, _ = _read(openings.path)
    names = ("where", "plain_ids", "shown_ids", "prompt", "length")
    for where, plain, shown, prompt, length in zip(*(table.column(n) for n in names), strict=True):
        grows = len(shown.values) - len(plain.values)
        whole = _whole(prompt.as_py(), length.as_py(), context=context, written=written)
        needed = grows + whole
        if needed > teacher_context:
            return where.as_py(), needed
    return None


def _whole(prompt: int, length: int, *, context: int, written: int) -> int:
    """Tokens of a document at most, of its own answer or of one that a model writes."""
    return max(length, min(context, prompt + written))


@lru_cache(maxsize=FILES_KEPT)
def _read(path: str) -> tuple[pa.Table, dict[bytes, int]]:
    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
    keys = table.column("key").to_pylist()
    return table, {key: line for line, key in enumerate(keys)}

"""SoftTargets on disk: the same Tables that travel, kept by row, their ids written as asked.

A store is a folder with one folder per teacher and question, named by their digest:
`description.json` says what they are, and every writer appends to an Arrow stream of its own, so
several write safely and a killed one leaves at most a torn tail. The index is rebuilt from the
files on opening; the files are memory-mapped.
"""

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from shared.errors import ConfigError, StorageError, TeacherError
from shared.rows import Rows
from shared.soft_targets import (
    SCHEMA_VERSION,
    IdsEncoding,
    ReaderStats,
    SoftTargets,
    TargetReader,
    TargetSpec,
)

DESCRIPTION = "description.json"


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """One folder of a store."""

    folder: Path
    teacher: dict[str, str]  # the engine's fingerprint
    spec: TargetSpec


def stored_answers(store: str | Path) -> list[StoredAnswers]:
    """What a store holds, so that a run without a teacher can learn whose answers they are."""
    found = []
    for path in sorted(Path(store).expanduser().glob(f"*/{DESCRIPTION}")):
        fields = json.loads(path.read_text())
        if fields["schema_version"] == SCHEMA_VERSION:
            spec = TargetSpec.from_dict(fields["spec"])
            found.append(StoredAnswers(path.parent, fields["teacher"], spec))
    return found


def stored_teacher(store: str | Path, spec: TargetSpec) -> dict[str, str]:
    """Fingerprint of the one teacher whose answers to `spec` are stored. Raises ConfigError."""
    answers = stored_answers(store)
    matching = [a for a in answers if a.spec == spec]
    if not matching:
        held = "; ".join(a.spec.in_words() for a in answers)
        raise ConfigError(
            f"targets.store {store} holds {held or 'nothing'}, asked is {spec.in_words()}; run "
            "with targets.teacher_free=false first, which fills it, or change targets"
        )
    if len(matching) > 1:
        raise ConfigError(
            f"targets.store {store} has answers of {len(matching)} teachers to the same question; "
            f"keep one of {', '.join(a.folder.name for a in matching)}"
        )
    return matching[0].teacher


class TargetStore:
    """The stored answers of one teacher to one question, by the hash of their rows.

    New ones are written with their ids as `ids` says; None: as they came.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        teacher: Mapping[str, str],
        spec: TargetSpec,
        ids: IdsEncoding | None = None,
    ) -> None:
        self._described = {
            "schema_version": SCHEMA_VERSION,
            "teacher": dict(teacher),
            "spec": spec.question(),
        }
        self._ids: IdsEncoding | None = ids
        key = json.dumps(self._described, sort_keys=True).encode()
        self._folder = Path(store).expanduser() / xxhash.xxh3_128_hexdigest(key)
        self._index: dict[bytes, tuple[pa.RecordBatch, int]] = {}
        self._writer: pa.RecordBatchStreamWriter | None = None
        for path in sorted(self._folder.glob("*.arrow")):
            for batch in _batches(path):
                self._remember(batch)

    def __len__(self) -> int:
        return len(self._index)

    def missing(self, rows: Rows) -> list[str]:
        """Names of the rows that are not stored, each once."""
        pairs = zip(rows.hashes(), rows.names(), strict=True)
        return list(dict.fromkeys(name for key, name in pairs if key not in self._index))

    def read(self, rows: Rows) -> SoftTargets:
        """The unit of these rows, bit for bit as it was written; where its rows have their ids
        written in two ways, as its first row. Raises TeacherError, naming the first rows that are
        not stored."""
        if missing := self.missing(rows):
            raise TeacherError(
                f"targets.store {self._folder.parent} lacks {len(missing)} of "
                f"{len(set(rows.names()))} rows, "
                f"first {', '.join(missing[:3])}; fill it with a teacher"
            )
        entries = [self._index[key] for key in rows.hashes()]
        found = [SoftTargets(pa.Table.from_batches([b.slice(row, 1)])) for b, row in entries]
        if not found:
            return SoftTargets(self._any_schema().empty_table())
        if len({tuple(batch.schema.types) for batch, _ in entries}) > 1:
            ids = found[0].spec.ids
            found = [targets.with_ids(ids) for targets in found]
        return SoftTargets(pa.concat_tables([each.table for each in found]).combine_chunks())

    def write(self, targets: SoftTargets) -> None:
        """Append the rows that are not stored yet. Raises StorageError; what was stored stays."""
        keys = targets.table.column("row_hash").to_pylist()
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        new = sorted(row for key, row in first.items() if key not in self._index)
        if not new:
            return
        chosen = SoftTargets(targets.table.take(new))
        if self._ids is not None:
            chosen = chosen.with_ids(self._ids)
        batch = chosen.table.combine_chunks().to_batches()[0]
        try:
            if self._writer is None:
                self._writer = self._open_writer(batch.schema)
            self._writer.write_batch(batch)
        except OSError as error:
            self._writer = None  # its tail is torn, nothing may follow it
            raise StorageError(
                f"targets.store cannot be written to {self._folder}: {error}; free space, or name "
                "another folder"
            ) from error
        self._remember(batch)

    def close(self) -> None:
        """End this writer's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_writer(self, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f"{DESCRIPTION}.{os.getpid()}"
        aside.write_text(json.dumps(self._described, indent=1, sort_keys=True))
        aside.replace(self._folder / DESCRIPTION)
        # Unbuffered, so that a killed writer loses no answer that it delivered.
        file = (self._folder / f"{uuid.uuid4().hex}.arrow").open("wb", buffering=0)
        return pa.ipc.new_stream(file, schema)

    def _remember(self, batch: pa.RecordBatch) -> None:
        for row, key in enumerate(batch.column("row_hash").to_pylist()):
            self._index.setdefault(key, (batch, row))

    def _any_schema(self) -> pa.Schema:
        if not self._index:
            raise TeacherError(f"targets.store {self._folder.parent} is empty; fill it first")
        return next(iter(self._index.values()))[0].schema


class StoreReader:
    """A `TargetReader` with no teacher alive; a row that is not stored stops the run.

    `teacher` None takes the one whose answers are stored.
    """

    def __init__(self, store: str | Path, *, teacher: Mapping[str, str] | None = None) -> None:
        self._stores = _Stores(store, teacher)
        self._asked: deque[tuple[Rows, TargetSpec]] = deque()
        self._stats = ReaderStats()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made."""
        return self._stats

    def submit(self, rows: Rows, spec: TargetSpec) -> None:
        """Ask for a unit."""
        self._asked.append((rows, spec))

    def next(self) -> SoftTargets:
        """The oldest unit asked for. Raises TeacherError naming rows that are not stored."""
        started = time.monotonic()
        rows, spec = self._asked[0]
        targets = self._stores.of(spec).read(rows)
        self._asked.popleft()
        _count(self._stats, targets, hit=True, wait_s=time.monotonic() - started)
        return targets

    def close(self) -> None:
        """Drop what was asked for."""
        self._asked.clear()


class RecordingReader:
    """Reads through a store: what it holds comes from disk, the rest from `reader`, written
    before it is delivered, its ids as `ids` says; None: as they came."""

    def __init__(
        self,
        reader: TargetReader,
        store: str | Path,
        *,
        teacher: Mapping[str, str],
        ids: IdsEncoding | None = None,
    ) -> None:
        self._reader = reader
        self._stores = _Stores(store, teacher, ids)
        self._asked: deque[tuple[Rows, TargetSpec, bool]] = deque()
        self._stats = ReaderStats()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made."""
        self._stats.retried_units = self._reader.stats.retried_units
        return self._stats

    def submit(self, rows: Rows, spec: TargetSpec) -> None:
        """Ask for a unit; a unit with one missing row is scored whole."""
        stored = len(rows) > 0 and not self._stores.of(spec).missing(rows)
        self._asked.append((rows, spec, stored))
        if not stored:
            self._reader.submit(rows, spec)

    def next(self) -> SoftTargets:
        """The oldest answer, from disk or from the inner reader."""
        started = time.monotonic()
        rows, spec, stored = self._asked[0]
        store = self._stores.of(spec)
        if stored:
            targets = store.read(rows)
        else:
            targets = self._reader.next()
            store.write(targets)
        self._asked.popleft()
        _count(self._stats, targets, hit=stored, wait_s=time.monotonic() - started)
        return targets

    def close(self) -> None:
        """Close the files and the inner reader."""
        self._asked.clear()
        self._stores.close()
        self._reader.close()


class _Stores:
    """The store's folder of each question, opened when it is first asked."""

    def __init__(
        self,
        store: str | Path,
        teacher: Mapping[str, str] | None,
        ids: IdsEncoding | None = None,
    ) -> None:
        self._store, self._teacher = store, teacher
        self._ids: IdsEncoding | None = ids
        self._open: dict[TargetSpec, TargetStore] = {}

    def of(self, spec: TargetSpec) -> TargetStore:
        if spec not in self._open:
            teacher = self._teacher or stored_teacher(self._store, spec)
            self._open[spec] = TargetStore(self._store, teacher=teacher, spec=spec, ids=self._ids)
        return self._open[spec]

    def close(self) -> None:
        for store in self._open.values():
            store.close()
        self._open.clear()


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of a file; a torn tail ends it."""
    try:
        yield from pa.ipc.open_stream(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError):
        return


def _count(stats: ReaderStats, targets: SoftTargets, *, hit: bool, wait_s: float) -> None:
    stats.units += 1
    stats.cache_hits += hit
    stats.wire_bytes += targets.num_bytes
    stats.wait_s += wait_s

"""Files of answers: written whole, never changed, with a checksum of every batch.

A file is an Arrow file that any Arrow tool reads. Its name is the hash of its bytes. Its footer
says which rows each batch answers and the batch's checksum, so that an index needs none of the
answers, and an answer is checked when it is read, not when a store is opened.
"""

import base64
import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from shared.errors import DamagedError, StorageError
from shared.in_words import in_bytes
from shared.locations import Location
from shared.targets.question import Question
from shared.targets.soft_targets import METADATA_KEY, SCHEMA_VERSION

FOOTER = b"tutelage.answers"
FORMAT = 1  # of the files and of the footer
SUFFIX = ".arrow"
RowPlace = tuple[str, int, int]  # a file's name, a batch of it, a row of that
KEY_SIZE = 16  # bytes of a row's hash
FILE_BYTES = 64 * 2**20  # what small files are put together to


@dataclass(frozen=True, slots=True)
class CommittedBatch:
    """Answers that were committed together."""

    record: pa.RecordBatch
    written_at: int  # nanoseconds since 1970; of copies of a row's answer, the oldest counts


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What a footer says of a batch."""

    keys: tuple[bytes, ...]  # hashes of its rows
    tokens: tuple[int, ...]  # positions with loss of each
    digest: str
    written_at: int


@dataclass(frozen=True, slots=True, eq=False)
class AnswerFile:
    """A file of a store: its footer, and its batches on demand."""

    place: Location
    size: int  # bytes
    facts: tuple[BatchFacts, ...]
    checked: set[int] = field(default_factory=set)  # batches read and found sound

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return self.place.path.rpartition("/")[2]

    def batch(self, number: int, reader: "pa.ipc.RecordBatchFileReader") -> pa.RecordBatch:
        """A batch whose checksum holds. Raises DamagedError, and FileNotFoundError."""
        with damage(self.place):
            record = reader.get_batch(number)
            if number not in self.checked:
                if batch_digest(record) != self.facts[number].digest:
                    raise ValueError(f"the checksum of batch {number} does not hold")
                self.checked.add(number)
        return record


@dataclass(frozen=True, slots=True)
class Holding:
    """What files hold together."""

    rows: int  # each counted once
    tokens: int  # positions with loss of them
    bytes: int  # of the files

    @staticmethod
    def of(files: Iterable[AnswerFile]) -> "Holding":
        """Added up."""
        tokens: dict[bytes, int] = {}
        size = 0
        for file in files:
            size += file.size
            for batch in file.facts:
                tokens.update(zip(batch.keys, batch.tokens, strict=True))
        return Holding(len(tokens), sum(tokens.values()), size)

    def in_words(self) -> str:
        """For a line on the terminal."""
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {in_bytes(self.bytes)}, "
            f"{self.bytes / max(1, self.tokens):,.1f} bytes per token"
        )


def question_key(teacher: Mapping[str, str], question: Question) -> str:
    """What a folder of a store is called: a hash of all that decides an answer but the row."""
    described = described_as(teacher, question)
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def described_as(teacher: Mapping[str, str], question: Question) -> dict[str, Any]:
    """The same in words, as a folder's description holds it."""
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "teacher": dict(teacher),
        "spec": question.identity(),
    }


def write_file(folder: Location, batches: Sequence[CommittedBatch]) -> AnswerFile:
    """Commit batches of one schema as a file of their own. Raises StorageError."""
    schema = batches[0].record.schema
    # As it will be read back: what is written differs in padding and empty validity maps.
    records = [pa.ipc.read_record_batch(b.record.serialize(), schema) for b in batches]
    facts = tuple(
        _facts(record, batch.written_at) for record, batch in zip(records, batches, strict=True)
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, metadata={FOOTER: _footer(schema, facts)}) as writer:
        for record in records:
            writer.write_batch(record)
    data = sink.getvalue()
    place = folder / f"{xxhash.xxh3_128_hexdigest(data)}{SUFFIX}"
    place.write(data)
    return AnswerFile(place, data.size, facts)


def open_file(place: Location, *, size: int, question: str) -> AnswerFile:
    """Read a file's footer. Raises DamagedError where it is no sound file of answers to
    `question`, the name of its folder, and FileNotFoundError where it is gone."""
    with damage(place):
        reader = open_reader(place)
        footer = (reader.metadata or {})[FOOTER]
        digest, _, text = footer.partition(b"\n")
        if xxhash.xxh3_128_hexdigest(text).encode() != digest:
            raise ValueError("the checksum of its footer does not hold")
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']}, this is {FORMAT}")
        if found["schema"] != schema_digest(reader.schema):
            raise ValueError("the checksum of its schema does not hold")
        described = json.loads((reader.schema.metadata or {})[METADATA_KEY])
        answered = Question.from_dict(described["spec"])
        if question_key(described["teacher"], answered) != question:
            raise ValueError("it holds answers to another question or of another teacher")
        facts = tuple(map(_read_facts, found["batches"]))
        if len(facts) != reader.num_record_batches:
            raise ValueError("batches are missing")
    return AnswerFile(place, size, facts)


def open_reader(place: Location) -> "pa.ipc.RecordBatchFileReader":
    """An Arrow reader of a file."""
    return pa.ipc.open_file(place.open())


def rewritten(
    folder: Location, files: Iterable[AnswerFile], *, without: Collection[RowPlace] = ()
) -> list[AnswerFile]:
    """The batches of files written anew to a folder, about FILE_BYTES to a file, but for some
    rows. The old files stay. Raises DamagedError and StorageError."""
    written: list[AnswerFile] = []
    waiting: dict[pa.Schema, list[CommittedBatch]] = {}
    for file in files:
        reader = open_reader(file.place)
        for number, facts in enumerate(file.facts):
            rows = range(len(facts.keys))
            kept = [row for row in rows if (file.name, number, row) not in without]
            record = file.batch(number, reader)
            if len(kept) < len(rows):
                record = record.take(pa.array(kept, pa.int64()))
            if kept:
                waiting.setdefault(reader.schema, []).append(
                    CommittedBatch(record, facts.written_at)
                )
        for schema, batches in waiting.items():
            if sum(batch.record.nbytes for batch in batches) >= FILE_BYTES:
                written.append(write_file(folder, batches))
                waiting[schema] = []
    return written + [write_file(folder, batches) for batches in waiting.values() if batches]


def check_bytes(place: Location) -> int:
    """Read a whole file, of any version, and compare its name's checksum; returns its size.
    Raises DamagedError and FileNotFoundError."""
    with damage(place):
        data = place.read()
        if xxhash.xxh3_128_hexdigest(data) + SUFFIX != place.path.rpartition("/")[2]:
            raise ValueError("the checksum of the file does not hold")
    return len(data)


def check_file(place: Location, *, question: str) -> None:
    """Read a whole file and compare every checksum. Raises DamagedError and FileNotFoundError."""
    size = check_bytes(place)
    opened = open_file(place, size=size, question=question)
    reader = open_reader(place)
    for number in range(len(opened.facts)):
        opened.batch(number, reader)


@contextmanager
def damage(place: Location) -> Iterator[None]:
    """Whatever shows that a file is not what was written, as a DamagedError."""
    try:
        yield
    except (FileNotFoundError, StorageError, DamagedError):
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and (error.errno is not None or place.local is None):
            raise StorageError(f"{place.shown} cannot be read: {reason}; try again") from error
        raise DamagedError(f"{place.shown} is damaged or no file of answers: {reason}") from error


def batch_digest(record: pa.RecordBatch) -> str:
    """Hash of all bytes of a batch that was read from a file or a message."""
    state = xxhash.xxh3_128(struct.pack("<q", record.num_rows))
    for column in record.columns:
        for buffer in column.buffers():
            state.update(struct.pack("<q", -1 if buffer is None else buffer.size))
            if buffer is not None:
                state.update(buffer)
    return state.hexdigest()


def schema_digest(schema: pa.Schema) -> str:
    """Hash of column names, types and metadata."""
    return xxhash.xxh3_128_hexdigest(schema.serialize())


def _facts(record: pa.RecordBatch, written_at: int) -> BatchFacts:
    tokens = record.column("label_logprob").value_lengths().to_pylist()
    keys = tuple(record.column("row_hash").to_pylist())
    return BatchFacts(keys, tuple(tokens), batch_digest(record), written_at)


def _footer(schema: pa.Schema, facts: Sequence[BatchFacts]) -> bytes:
    batches = [
        {
            "keys": base64.b64encode(b"".join(batch.keys)).decode(),
            "tokens": batch.tokens,
            "digest": batch.digest,
            "written_at": batch.written_at,
        }
        for batch in facts
    ]
    fields = {"format": FORMAT, "schema": schema_digest(schema), "batches": batches}
    text = json.dumps(fields).encode()
    return xxhash.xxh3_128_hexdigest(text).encode() + b"\n" + text


def _read_facts(batch: Mapping[str, Any]) -> BatchFacts:
    joined = base64.b64decode(batch["keys"])
    keys = tuple(joined[at : at + KEY_SIZE] for at in range(0, len(joined), KEY_SIZE))
    return BatchFacts(keys, tuple(batch["tokens"]), batch["digest"], batch["written_at"])

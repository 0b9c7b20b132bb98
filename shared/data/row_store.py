"""Rows of one domain on disk: a memory-mapped Arrow file with access by row in constant time.

R rows asked for   D documents
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from shared.data.rows import IMAGES, SCHEMA, Rows
from shared.errors import DataError
from shared.images.row_image import RowImage

METADATA_KEY = b"tutelage.rows"
ROWS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Rows of one domain in memory, one entry per row, before they are written."""

    input_ids: list[np.ndarray]
    doc_starts: list[np.ndarray]
    loss_masks: list[np.ndarray]
    images: list[tuple[RowImage, ...]] = field(default_factory=list)  # empty: no row has any

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Positions with loss over all rows."""
        return sum(int(mask.sum()) for mask in self.loss_masks)


def write_rows(path: Path, *, domain: str, rows: RaggedRows) -> None:
    """Write a domain's rows as an Arrow file that `RowStore` reads; row i gets index i."""
    facts = {
        "num_rows": len(rows),
        "num_loss_tokens": rows.num_loss_tokens,
        "rows_per_batch": ROWS_PER_BATCH,
    }
    schema = SCHEMA.append(IMAGES) if any(rows.images) else SCHEMA
    schema = schema.with_metadata({METADATA_KEY: json.dumps(facts)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for first in range(0, len(rows), ROWS_PER_BATCH):
            chosen = slice(first, min(first + ROWS_PER_BATCH, len(rows)))
            indices = range(len(rows))[chosen]
            built = Rows.build(
                domains=[domain] * len(indices),
                indices=indices,
                input_ids=rows.input_ids[chosen],
                doc_starts=rows.doc_starts[chosen],
                loss_masks=rows.loss_masks[chosen],
            )
            if any(rows.images):
                read = [[one.read() for one in own] for own in rows.images[chosen]]
                built = built.with_images(read)
            writer.write_table(built.table)


@dataclass(frozen=True, slots=True)
class RowStore:
    """A domain's rows, mapped from disk; only rows that are taken are read."""

    path: str
    num_rows: int
    num_loss_tokens: int
    rows_per_batch: int
    reader: pa.ipc.RecordBatchFileReader

    @staticmethod
    def open(path: str | Path) -> "RowStore":
        """Map a file of `write_rows`. Raises DataError where it is missing or damaged."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            facts = json.loads((reader.schema.metadata or {})[METADATA_KEY])
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(
                f"{path} is no readable file of rows ({str(error).splitlines()[0]}); "
                "remove it and start again, it is built anew"
            ) from None
        return RowStore(str(path), reader=reader, **facts)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def mean_loss_tokens(self) -> float:
        """Positions with loss per row."""
        return self.num_loss_tokens / self.num_rows if self.num_rows else 0.0

    def loss_tokens(self) -> np.ndarray:
        """Positions with loss of every row, int64 [num_rows]."""
        counts = [np.zeros(0, np.int64)]
        for batch in range(self.reader.num_record_batches):
            masks = self.reader.get_batch(batch).column("loss_mask")
            ends = np.concatenate([[0], np.cumsum(masks.values.to_numpy(), dtype=np.int64)])
            counts.append(np.diff(ends[masks.offsets.to_numpy()]))
        return np.concatenate(counts)

    def largest_id(self) -> int:
        """The largest token id, -1 where there are no rows."""
        batches = map(self.reader.get_batch, range(self.reader.num_record_batches))
        ids = (batch.column("input_ids").flatten().to_numpy() for batch in batches)
        return max((int(found.max(initial=-1)) for found in ids), default=-1)

    def longest_document(self) -> int:
        """Tokens of the longest document."""
        longest = 0
        for batch in map(self.reader.get_batch, range(self.reader.num_record_batches)):
            ends_R = np.cumsum(_lengths(batch.column("input_ids")))
            starts_R = np.concatenate([[0], ends_R[:-1]])
            row_D = np.repeat(np.arange(batch.num_rows), _lengths(batch.column("doc_starts")))
            starts_D = starts_R[row_D] + batch.column("doc_starts").flatten().to_numpy()
            longest = max(longest, int(np.diff(starts_D, append=ends_R[-1:]).max(initial=0)))
        return longest

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices` [R], in that order, copied out of the map."""
        return take_rows([self], np.zeros(len(indices), np.int64), indices)

    def units(self, size: int, *, most: int | None = None) -> Iterator[Rows]:
        """All rows, or the first `most`, in file order, `size` at a time."""
        count = len(self) if most is None else min(len(self), most)
        for first in range(0, count, size):
            yield self.take(range(first, min(first + size, count)))

    def row(self, index: int) -> pa.RecordBatch:
        """One row as a zero-copy slice of the map. Raises IndexError outside the file."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"{self.path} has {self.num_rows} rows, not row {index}")
        batch, offset = divmod(index, self.rows_per_batch)
        return self.reader.get_batch(batch).slice(offset, 1)


def take_rows(
    stores: Sequence[RowStore],
    domain_index_R: Sequence[int] | np.ndarray,
    row_index_R: Sequence[int] | np.ndarray,
) -> Rows:
    """Rows of several domains in the given order: row r is row `row_index_R[r]` of
    `stores[domain_index_R[r]]`. Copied, so a Rows carries these rows and nothing else."""
    pairs = zip(domain_index_R, row_index_R, strict=True)
    found = [stores[int(domain)].row(int(index)) for domain, index in pairs]
    ragged = {
        name: [batch.column(name)[0].values.to_numpy() for batch in found]
        for name in ("input_ids", "doc_starts", "loss_mask")
    }
    return Rows.build(
        domains=[batch.column("domain")[0].as_py() for batch in found],
        indices=[batch.column("index")[0].as_py() for batch in found],
        input_ids=ragged["input_ids"],
        doc_starts=ragged["doc_starts"],
        loss_masks=ragged["loss_mask"],
        images=[_images(batch) for batch in found],
    )


def _images(row: pa.RecordBatch) -> list[bytes]:
    """The images of a single row."""
    return row.column(IMAGES.name)[0].as_py() if IMAGES.name in row.schema.names else []


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return lists.value_lengths().to_numpy()

"""What an evaluation found in each validation document: sums over its tokens with loss.

Standard errors are over these documents, and two evaluations of one validation set are compared
document by document. A document that was split over rows has an entry for each part.

D documents   B bins of confidence
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import feather

from shared.errors import CheckpointError

# Bins of confidence, equally wide, as in Guo et al., "On Calibration of Modern Neural Networks",
# 2017: bin b, from 0, holds those above b/15 and up to (b + 1)/15.
NUM_BINS = 15

SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "row": pa.int64(),  # of the domain's validation rows
        "document": pa.int32(),  # of the row, from 0
        "content": pa.uint64(),  # hash of its tokens, and of which have loss
        "tokens": pa.int64(),  # with loss; what follows are sums over them
        "student_nll": pa.float64(),  # nats
        "teacher_nll": pa.float64(),  # NaN without a teacher, as the others of it
        "kl": pa.float64(),  # KL(teacher || student)
        # Of the tokens in each bin: how many likeliest ids were right, less their probabilities.
        "student_gap": pa.list_(pa.float64(), NUM_BINS),
        "teacher_gap": pa.list_(pa.float64(), NUM_BINS),
    }
)
KEYS = ("domain", "row", "document")
GAPS = ("student_gap", "teacher_gap")


@dataclass(frozen=True, slots=True)
class DocumentSums:
    """An Arrow table of `SCHEMA`, in the order of its first three columns."""

    table: pa.Table

    @staticmethod
    def joined(tables: list[pa.Table], domains: tuple[str, ...]) -> "DocumentSums":
        """Parts of an evaluation in any order, put in that of the domains, rows and documents."""
        found = pa.concat_tables([SCHEMA.empty_table(), *tables])
        place = {name: index for index, name in enumerate(domains)}
        domain_D = [place[name] for name in found.column("domain").to_pylist()]
        row_D, document_D = (found.column(name).to_numpy() for name in KEYS[1:])
        return DocumentSums(found.take(np.lexsort((document_D, row_D, domain_D))))

    @staticmethod
    def read(path: Path) -> "DocumentSums":
        """Read what `write` wrote. Raises CheckpointError for a damaged file."""
        try:
            return DocumentSums(feather.read_table(path).select(SCHEMA.names))
        except (OSError, pa.ArrowException, KeyError):
            raise CheckpointError(
                f"{path} cannot be read; remove it and run `tutelage eval` again"
            ) from None

    def write(self, path: Path) -> None:
        """Write a whole file or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        feather.write_feather(self.table, str(draft), compression="uncompressed")
        draft.replace(path)

    def __len__(self) -> int:
        return self.table.num_rows

    def of(self, domain: str) -> "DocumentSums":
        """The documents of one domain."""
        is_own_D = [name == domain for name in self.table.column("domain").to_pylist()]
        return DocumentSums(self.table.filter(pa.array(is_own_D, pa.bool_())))

    def places(self) -> list[tuple[str, int, int, int]]:
        """Domain, row, document and content of each: equal where the validation text is."""
        columns = (self.table.column(name).to_pylist() for name in (*KEYS, "content"))
        return list(zip(*columns, strict=True))

    def column(self, name: str) -> np.ndarray:
        """A column [D], or [D, B] of a gap."""
        if name in GAPS:
            lists = self.table.column(name).combine_chunks()
            return lists.flatten().to_numpy().reshape(-1, NUM_BINS)
        return self.table.column(name).to_numpy()


def bins(confidence_N: np.ndarray) -> np.ndarray:
    """The bin of each confidence, int64 [N]."""
    found_N = np.ceil(np.asarray(confidence_N, np.float64) * NUM_BINS).astype(np.int64) - 1
    return found_N.clip(0, NUM_BINS - 1)

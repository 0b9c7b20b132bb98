"""The sums over documents of an evaluation, gathered unit by unit and rank by rank.

N positions with loss of a unit   D documents of a unit   R rows of a unit   B bins of confidence
"""

from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from torch import Tensor

from shared.data.rows import Rows
from shared.run.document_sums import NUM_BINS, SCHEMA, DocumentSums, bins
from student_trainer.objective import MEASURED
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch


class DocumentAccumulator:
    """What this rank has measured so far."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, rows: Rows, batch: Batch, measured_8N: Tensor) -> None:
        """Add a unit, from what mode `measure` of the objective tells of its positions."""
        document_N = batch["document_N"].cpu().numpy()
        starts = rows.column("doc_starts")
        row_D = np.repeat(np.arange(len(rows)), [len(own) for own in starts])
        number_D = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(own)) for own in starts)])
        value_N: dict[str, np.ndarray] = {}
        value_N |= zip(MEASURED, measured_8N.cpu().numpy(), strict=True)
        if "label_logprob_N" in batch:
            value_N["teacher_nll"] = -batch["label_logprob_N"].double().cpu().numpy()
        else:
            value_N["teacher_nll"] = value_N["kl"] = np.full(len(document_N), np.nan)
        count = len(row_D)
        domains, indices = rows.domains(), rows.table.column("index").to_pylist()
        tokens_D = np.bincount(document_N, minlength=count)
        columns: dict[str, Any] = {
            "domain": [domains[row] for row in row_D],
            "row": [indices[row] for row in row_D],
            "document": number_D,
            "content": _contents(rows),
            "tokens": tokens_D,
        }
        for name in ("student_nll", "teacher_nll", "kl"):
            columns[name] = np.bincount(document_N, weights=value_N[name], minlength=count)
        for model in ("student", "teacher"):
            gap_DB = _gaps(
                document_N,
                value_N[f"{model}_confidence"],
                value_N[f"{model}_right"],
                count=count,
            )
            columns[f"{model}_gap"] = pa.FixedSizeListArray.from_arrays(
                pa.array(gap_DB.ravel()), NUM_BINS
            )
        table = pa.table(columns, schema=SCHEMA)
        self._tables.append(table.filter(pa.array(tokens_D > 0)))

    def joined(self, ranks: Ranks, domains: tuple[str, ...]) -> DocumentSums:
        """Those of all ranks, on every rank."""
        own = pa.concat_tables([SCHEMA.empty_table(), *self._tables])
        return DocumentSums.joined(ranks.gather(own), domains)


def _contents(rows: Rows) -> list[int]:
    """A hash of each document."""
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    return [
        xxhash.xxh64_intdigest(own_ids.tobytes() + own_mask.tobytes())
        for ids, starts, mask in zip(*columns, strict=True)
        for own_ids, own_mask in zip(
            np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True
        )
    ]


def _gaps(
    document_N: np.ndarray, confidence_N: np.ndarray, right_N: np.ndarray, *, count: int
) -> np.ndarray:
    """Right ids less their probabilities, by document and bin [D, B]; NaN where any is unknown."""
    bin_N = bins(np.nan_to_num(confidence_N))
    weights_N = right_N - confidence_N
    cell_N = document_N * NUM_BINS + bin_N
    sums = np.bincount(cell_N, weights=weights_N, minlength=count * NUM_BINS)
    return sums.reshape(-1, NUM_BINS)

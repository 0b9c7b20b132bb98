"""Rows on disk, taken by index."""

import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.data.row_store import ROWS_PER_BATCH, RaggedRows, RowStore, take_rows, write_rows
from shared.data.rows import SCHEMA
from shared.errors import DataError


def ragged(num_rows: int, *, length: int = 40, seed: int = 0) -> RaggedRows:
    """Random rows of two documents, half of the positions with loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length, num_rows)
    return RaggedRows(
        input_ids=[rng.integers(0, 512, n).astype(np.int32) for n in lengths],
        doc_starts=[np.array([0, n // 2], np.int32) for n in lengths],
        loss_masks=[rng.integers(0, 2, n).astype(np.uint8) for n in lengths],
    )


def store(path: Path, rows: RaggedRows, *, domain: str = "math") -> RowStore:
    """Written and opened."""
    write_rows(path, domain=domain, rows=rows)
    return RowStore.open(path)


def test_rows_come_back_in_the_order_asked_for_across_batches(tmp_path: Path) -> None:
    rows = ragged(3 * ROWS_PER_BATCH + 7)
    opened = store(tmp_path / "a.arrow", rows)
    indices = [len(rows) - 1, 0, ROWS_PER_BATCH, ROWS_PER_BATCH - 1, 0]
    taken = opened.take(indices)
    assert taken.names() == [f"math/{i}" for i in indices]
    for name, column in (
        ("input_ids", rows.input_ids),
        ("doc_starts", rows.doc_starts),
        ("loss_mask", rows.loss_masks),
    ):
        for got, index in zip(taken.column(name), indices, strict=True):
            np.testing.assert_array_equal(got, column[index])
    assert taken.table.schema.equals(SCHEMA)


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    opened = store(tmp_path / "a.arrow", ragged(300))
    counts = opened.take(range(300)).num_loss_tokens()
    assert len(opened) == 300
    assert opened.num_loss_tokens == counts.sum()
    np.testing.assert_array_equal(opened.loss_tokens(), counts)
    assert opened.mean_loss_tokens == pytest.approx(counts.mean())


def test_rows_of_several_domains_keep_the_given_order(tmp_path: Path) -> None:
    stores = [
        store(tmp_path / f"{name}.arrow", ragged(9, seed=seed), domain=name)
        for seed, name in enumerate(("math", "code"))
    ]
    mixed = take_rows(stores, np.array([1, 0, 1]), np.array([8, 2, 0]))
    assert mixed.names() == ["code/8", "math/2", "code/0"]
    assert mixed.hashes()[1] == stores[0].take([2]).hashes()[0]
    assert len(take_rows(stores, [], [])) == 0


def test_taken_rows_carry_themselves_alone(tmp_path: Path) -> None:
    opened = store(tmp_path / "a.arrow", ragged(1000, length=500))
    assert len(pickle.dumps(opened.take([3]))) < 8192


def test_a_row_outside_the_file_is_an_index_error(tmp_path: Path) -> None:
    opened = store(tmp_path / "a.arrow", ragged(5))
    for index in (-1, 5):
        with pytest.raises(IndexError, match="has 5 rows, not row"):
            opened.take([index])


def test_a_missing_or_torn_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pytest.raises(DataError, match="no readable file of rows"):
        RowStore.open(path)
    write_rows(path, domain="math", rows=ragged(50))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="no readable file of rows"):
        RowStore.open(path)


def test_opening_and_taking_reads_only_what_is_taken(tmp_path: Path) -> None:
    big = ragged(100 * ROWS_PER_BATCH, length=300)
    opened = store(tmp_path / "a.arrow", big)
    before = pa.total_allocated_bytes()
    taken = opened.take([5, 20_000, 12_345, 9])
    assert pa.total_allocated_bytes() - before < 64 * 1024
    assert len(taken) == 4


def test_the_cost_of_a_batch_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small = store(tmp_path / "small.arrow", ragged(ROWS_PER_BATCH))
    large = store(tmp_path / "large.arrow", ragged(100 * ROWS_PER_BATCH, length=100))

    def seconds(opened: RowStore) -> float:
        spread = np.linspace(0, len(opened) - 1, 32).astype(int)
        laps = []
        for _ in range(15):
            start = time.perf_counter()
            opened.take(spread)
            laps.append(time.perf_counter() - start)
        return min(laps)

    assert seconds(large) < 10 * seconds(small)


def test_the_longest_document_is_found_wherever_it_lies(tmp_path: Path) -> None:
    rows = ragged(2 * ROWS_PER_BATCH + 5)
    ends = [
        [*starts[1:], len(ids)] for ids, starts in zip(rows.input_ids, rows.doc_starts, strict=True)
    ]
    lengths = [np.subtract(e, s).max() for e, s in zip(ends, rows.doc_starts, strict=True)]
    assert store(tmp_path / "a.arrow", rows).longest_document() == max(lengths)
    for place in (0, ROWS_PER_BATCH, len(rows) - 1):
        rows.input_ids[place] = np.arange(100 + place, dtype=np.int32)
        rows.loss_masks[place] = np.ones(100 + place, np.uint8)
        rows.doc_starts[place] = np.array([0, 7, 9], np.int32)
        found = store(tmp_path / f"{place}.arrow", rows).longest_document()
        assert found == 100 + place - 9
    assert store(tmp_path / "none.arrow", ragged(0)).longest_document() == 0

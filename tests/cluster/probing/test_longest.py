"""Which rows a probe begins with."""

import numpy as np
import pytest

from cluster.probing.longest import longest_rows
from shared.data.row_store import RaggedRows, RowStore, write_rows


def store_of(path, documents_R: list[list[int]]) -> RowStore:
    """Rows by the lengths of their documents."""
    tokens = [sum(lengths) for lengths in documents_R]
    rows = RaggedRows(
        input_ids=[np.arange(size, dtype=np.int32) for size in tokens],
        doc_starts=[np.cumsum([0, *lengths[:-1]]).astype(np.int32) for lengths in documents_R],
        loss_masks=[np.append(np.ones(size - 1), 0).astype(np.uint8) for size in tokens],
    )
    write_rows(path, domain=path.stem, rows=rows)
    return RowStore.open(path)


@pytest.fixture
def stores(tmp_path) -> list[RowStore]:
    # 3 documents of at most 30 fill 3 lines of 32, as one line all of them fill 96; 70 and 20 fill
    # 2 lines of 96; 120 fill one of 128.
    first = store_of(tmp_path / "a.arrow", [[10], [30, 30, 10], [70, 20]])
    return [first, store_of(tmp_path / "b.arrow", [[120], [40]])]


def test_the_longest_rows_of_all_stores_come_first(stores):
    rows = longest_rows(stores, 3, packed=True)
    assert [len(ids) for ids in rows.column("input_ids")] == [120, 70, 90]
    assert rows.domains() == ["b", "a", "a"]


def test_a_row_of_several_documents_fills_a_line_for_each_where_they_are_not_packed(stores):
    rows = longest_rows(stores, 2, packed=False)
    assert [len(ids) for ids in rows.column("input_ids")] == [90, 120]


def test_rows_come_again_where_there_are_fewer(stores):
    rows = longest_rows(stores[1:], 5, packed=True)
    assert [len(ids) for ids in rows.column("input_ids")] == [120, 40, 120, 40, 120]

"""Documents changed by rules: what stays, what moves, and that nothing else decides."""

from pathlib import Path

import numpy as np
import pytest

from shared.config.text.augmentation import Augmentation
from shared.data.augmented.augmenting import UNCHANGED, Augmenter
from shared.data.row_store import RaggedRows, RowStore, write_rows
from shared.data.rows import Rows
from tests.shared.data.test_rollouts import rows_of

SPECIAL = 7  # stands in the text of both domains
OTHERS = range(5000, 5400)
COUNT = 60


def text() -> Rows:
    """Rows of domain d: a prompt and its answer, a text without a prompt, and special tokens."""
    rows = rows_of(*[[(6, 40), (0, 50)]] * COUNT)
    ids = [np.where(np.arange(90) % 9 == 4, SPECIAL, own) for own in rows.column("input_ids")]
    names = ("doc_starts", "loss_mask")
    starts, masks = (rows.column(name) for name in names)
    domains, indices = rows.domains(), range(COUNT)
    built = {"input_ids": ids, "doc_starts": starts, "loss_masks": masks}
    return Rows.build(domains=domains, indices=indices, **built)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[RowStore, RowStore]:
    """The text, and that of another domain."""
    folder, found = tmp_path_factory.mktemp("stores"), []
    other = np.array([*OTHERS, SPECIAL, SPECIAL])
    ids = {"d": text().column("input_ids"), "e": [other, other]}
    for domain, arrays in ids.items():
        mask = [np.append(np.ones(len(own) - 1, np.uint8), 0) for own in arrays]
        starts = [np.zeros(1, np.int64)] * len(arrays)
        path = Path(folder / f"{domain}.arrow")
        write_rows(path, domain=domain, rows=RaggedRows(arrays, starts, mask))
        found.append(RowStore.open(path))
    return found[0], found[1]


def changed(stores, rows: Rows, *, epoch: int = 0, seed: int = 0, **options) -> Rows:
    section = Augmentation(**{"share": 1.0, "replace": 0, "swap": 0, "delete": 0} | options)
    augmenter = Augmenter(section, stores, seed, (SPECIAL,))
    return augmenter.changed(rows, np.zeros(len(rows), int), np.full(len(rows), epoch))


def documents(rows: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and loss mask of each."""
    columns = (rows.documents().column(name) for name in ("input_ids", "loss_mask"))
    return list(zip(*columns, strict=True))


ALL = {"replace": 0.2, "swap": 0.2, "delete": 0.2}


def test_what_is_changed_depends_on_seed_row_document_and_epoch_alone(stores):
    rows = text()
    together = changed(stores, rows, **ALL)
    one = rows.part(slice(3, 4))
    assert changed(stores, one, **ALL).table.equals(together.part(slice(3, 4)).table)
    assert not changed(stores, rows, **ALL, epoch=1).table.equals(together.table)
    assert not changed(stores, rows, **ALL, seed=1).table.equals(together.table)
    first, second = together.column("input_ids")[:2]
    assert not np.array_equal(first, second)  # of two rows alike


def test_a_share_of_documents_is_changed_and_the_others_are_as_they_were(stores):
    rows = text()
    found = changed(stores, rows, share=0.3, **ALL)
    numbers = found.changed()
    assert numbers is not None
    assert len(numbers) == 2 * COUNT
    assert 0.15 < (numbers != UNCHANGED).mean() < 0.45
    assert (numbers >= 0).all()
    assert len(set(numbers[numbers != UNCHANGED])) == (numbers != UNCHANGED).sum()
    for (ids, mask), (was, loss), number in zip(
        documents(found), documents(rows), numbers, strict=True
    ):
        alike = np.array_equal(ids, was) and np.array_equal(mask, loss)
        assert alike == (number == UNCHANGED)


@pytest.mark.parametrize("options", [{"replace": 0.5}, {"swap": 0.5}, {"delete": 0.5}, ALL])
def test_ends_and_special_tokens_stay_and_a_token_keeps_its_loss(stores, options):
    rows = text()
    for (ids, mask), (was, loss) in zip(
        documents(changed(stores, rows, **options)), documents(rows), strict=True
    ):
        assert (ids[0], ids[-1]) == (was[0], was[-1])
        assert (ids == SPECIAL).sum() == (was == SPECIAL).sum()
        assert len(ids) == len(mask)
        assert mask[-1] == 0
        learnt, was_learnt = set(ids[1:][mask[:-1] == 1]), set(was[1:][loss[:-1] == 1])
        prompt = set(was) - was_learnt
        assert not learnt & (prompt - {SPECIAL})
        if "delete" not in options:
            assert np.array_equal(mask, loss)


def test_tokens_are_replaced_by_those_of_another_domain(stores):
    rows = text()
    pairs = list(zip(documents(changed(stores, rows, replace=0.5)), documents(rows), strict=True))
    new = np.concatenate([ids[ids != was] for (ids, _), (was, _) in pairs])
    assert set(new) <= set(OTHERS)
    ordinary = sum(int((was[1:-1] != SPECIAL).sum()) for _, (was, _) in pairs)
    assert len(new) / ordinary == pytest.approx(0.5, abs=0.03)


def test_neighbours_change_places_and_none_is_lost(stores):
    rows = text()
    pairs = list(zip(documents(changed(stores, rows, swap=0.3)), documents(rows), strict=True))
    assert all(sorted(ids) == sorted(was) for (ids, _), (was, _) in pairs)
    moved = np.concatenate([ids != was for (ids, _), (was, _) in pairs])
    assert 0.15 < moved.mean() < 0.35
    far = [
        abs(np.flatnonzero(was == t)[0] - at)
        for (ids, _), (was, _) in pairs[:20]
        for at, t in enumerate(ids)
        if t != SPECIAL
    ]
    assert max(far) == 1


def test_tokens_are_left_out(stores):
    rows = text()
    pairs = list(zip(documents(changed(stores, rows, delete=0.25)), documents(rows), strict=True))
    kept = sum(len(ids) for (ids, _), _ in pairs)
    ordinary = sum(int((was[1:-1] != SPECIAL).sum()) for _, (was, _) in pairs)
    lost = sum(len(was) for _, (was, _) in pairs) - kept
    assert lost / ordinary == pytest.approx(0.25, abs=0.03)
    assert all(set(ids) <= set(was) for (ids, _), (was, _) in pairs)


def test_draws_stay_beside_changed_rows_and_are_asked_without_numbers(stores):
    drawn = text().with_draws(np.arange(COUNT))
    found = changed(stores, drawn, **ALL)
    assert found.draws().tolist() == list(range(COUNT))
    assert found.as_asked().changed() is None
    assert found.as_asked().hashes() == found.hashes()

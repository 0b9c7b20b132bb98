"""Masks of documents and what fills them: which tokens, by what chance, and on disk.

M masks   K ids that a teacher names at a position
"""

from pathlib import Path

import numpy as np
import pytest

from shared.config.text.augmentation import Augmentation
from shared.data.augmented.augmenting import UNCHANGED, Augmenter
from shared.data.augmented.fills import Fills, Masked, drawn, generator_of, write
from shared.errors import DataError
from tests.shared.data.augmented.test_augmenting import COUNT, SPECIAL, documents, stores, text

__all__ = ["stores"]
COPIES = 2


def masked(document: np.ndarray, *, share: float = 0.4, copy: int = 0, seed: int = 0, **more):
    random = generator_of(seed, "d/3", 1, copy)
    return Masked.of(document, random, share=share, special_ids=(SPECIAL,), **more)


def test_masks_are_a_share_of_what_may_be_changed_drawn_by_seed_document_and_copy() -> None:
    document = np.where(np.arange(2000) % 5 == 0, SPECIAL, np.arange(100, 2100))
    found = masked(document)
    assert not set(found.place_M) & {0, 1999}
    assert (document[found.place_M] != SPECIAL).all()
    ordinary = (document[1:-1] != SPECIAL).sum()
    assert len(found.place_M) / ordinary == pytest.approx(0.4, abs=0.03)
    assert np.array_equal(masked(document).place_M, found.place_M)
    for other in (masked(document, copy=1), masked(document, seed=1)):
        assert not np.array_equal(other.place_M, found.place_M)
    assert masked(document, first=700).place_M.min() >= 700


def test_a_fill_is_drawn_by_the_teachers_probabilities_among_its_likeliest_others() -> None:
    """By inversion: evenly spread chances give every id its share, and others none."""
    ids, share = np.array([3, 5, SPECIAL, 9, 11]), np.array([0.1, 0.3, 0.25, 0.2, 0.15])
    chance_M = (np.arange(4000) + 0.5) / 4000
    asked = {"own_M": np.full(4000, 5), "chance_M": chance_M, "special_ids": (SPECIAL,)}
    both_MK = np.tile(ids, (4000, 1)), np.tile(np.log(share), (4000, 1))
    for most, expected in ((2, {9: 0.2, 11: 0.15}), (9, {3: 0.1, 9: 0.2, 11: 0.15})):
        found, counts = np.unique(drawn(*both_MK, most=most, **asked), return_counts=True)
        assert found.tolist() == [*expected]
        np.testing.assert_allclose(
            counts / 4000, np.array([*expected.values()]) / sum(expected.values()), atol=1e-3
        )


def test_a_mask_whose_teacher_names_no_other_id_stays_unfilled() -> None:
    ids_MK, logprobs_MK = np.array([[5, SPECIAL], [5, 8]]), np.log([[0.6, 0.4], [0.6, 0.4]])
    asked = {"own_M": np.array([5, 5]), "chance_M": np.array([0.5, 0.5])}
    assert drawn(ids_MK, logprobs_MK, most=2, special_ids=(SPECIAL,), **asked).tolist() == [-1, 8]


@pytest.fixture
def filled(tmp_path: Path) -> Fills:
    """Copy c of every row has id 9000 + c at places 2 and 50, the one of each document."""
    places = [np.array([2, 50])] * (COPIES * COUNT)
    ids = [np.full(2, 9000 + line % COPIES) for line in range(COPIES * COUNT)]
    write(tmp_path / "fills.arrow", copies=COPIES, places=places, ids=ids)
    return Fills.open(tmp_path / "fills.arrow")


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_changed_documents_have_the_fills_of_their_epochs_copy_and_others_none(
    stores, filled: Fills, epoch: int
) -> None:
    section = Augmentation(share=0.5, mask=0.1, copies=COPIES, replace=0, swap=0, delete=0)
    rows, domain_R = text(), np.zeros(COUNT, int)
    augmenter = Augmenter(section, stores, 0, (SPECIAL,), [filled, filled])
    changed = augmenter.changed(rows, domain_R, np.full(COUNT, epoch))
    numbers = changed.changed()
    assert numbers is not None
    assert 0 < (numbers != UNCHANGED).sum() < len(numbers)
    for line, ((ids, mask), (was, loss)) in enumerate(
        zip(documents(changed), documents(rows), strict=True)
    ):
        place = 2 if line % 2 == 0 else 50 - 40
        expected = was.copy()
        if numbers[line] != UNCHANGED:
            expected[place] = 9000 + epoch % COPIES
        assert np.array_equal(ids, expected)
        assert np.array_equal(mask, loss)


@pytest.mark.parametrize("damage", ["cut", "changed", "absent"])
def test_damaged_fills_are_refused_by_name(tmp_path: Path, filled: Fills, damage: str) -> None:
    path = tmp_path / "fills.arrow"
    whole = path.read_bytes()
    at = whole.rindex(np.int32(9000).tobytes())
    other = whole[:at] + np.int32(9002).tobytes() + whole[at + 4 :]
    damaged = {"cut": whole[:-40], "changed": other, "absent": None}[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"fills.arrow holds what a teacher filled masks with"):
        Fills.open(path)

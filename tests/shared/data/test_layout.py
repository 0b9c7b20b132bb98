"""The padded batch, and the one shift of labels."""

import numpy as np
import pytest

from shared.data.layout import lay_out, padded_length
from shared.data.passes import TOGETHER, Passes
from shared.data.rows import Rows
from tests.shared.data.test_rows import rows

# Tokens count upwards within a document: a model that predicts "one more" is perfect.
COUNTING = Rows.build(
    domains=["a", "a"],
    indices=[0, 1],
    input_ids=[np.array([10, 11, 12, 13, 70, 71, 72]), np.array([40, 41, 42])],
    doc_starts=[np.array([0, 4]), np.array([0])],
    loss_masks=[np.array([0, 1, 1, 0, 1, 1, 0]), np.array([1, 1, 0])],
)


def nll_of_a_counter(predicting: np.ndarray, labels: np.ndarray) -> float:
    """Mean NLL of a model that gives 0.9 to the successor and shares the rest over 100 ids."""
    return float(np.mean(np.where(labels == predicting + 1, -np.log(0.9), -np.log(0.001))))


@pytest.mark.parametrize("packed", [True, False])
def test_a_wrong_shift_changes_the_number(packed: bool) -> None:
    layout = lay_out(COUNTING, packed=packed)
    flat = layout.input_ids_BT.reshape(-1)
    right = nll_of_a_counter(flat[layout.loss_index_N], layout.label_N)
    assert right == pytest.approx(-np.log(0.9))
    for shift in (-1, 1):
        wrong = nll_of_a_counter(flat[layout.loss_index_N + shift], layout.label_N)
        assert wrong > 3


@pytest.mark.parametrize("packed", [True, False])
def test_entries_are_in_row_order_with_their_labels_and_rows(packed: bool) -> None:
    layout = lay_out(COUNTING, packed=packed)
    assert layout.label_N.tolist() == [12, 13, 71, 72, 41, 42]
    assert layout.row_N.tolist() == [0, 0, 0, 0, 1, 1]
    assert layout.document_N.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_a_position_belongs_to_the_document_that_holds_it_and_its_label(
    seed: int, packed: bool
) -> None:
    """Every document repeats a token of its own; some have no loss at all."""
    generator = np.random.default_rng(seed)
    ids, starts, masks, document = [], [], [], 0
    for _ in range(5):
        lengths = generator.integers(2, 9, int(generator.integers(1, 5)))
        mask = generator.integers(0, 2, int(lengths.sum())).astype(np.uint8)
        mask[np.cumsum(lengths) - 1] = 0
        starts.append(np.cumsum([0, *lengths[:-1]]))
        ids.append(np.repeat(np.arange(document, document + len(lengths)), lengths))
        masks.append(mask)
        document += len(lengths)
    unit = Rows.build(
        domains=["a"] * 5, indices=range(5), input_ids=ids, doc_starts=starts, loss_masks=masks
    )
    layout = lay_out(unit, packed=packed)
    assert layout.document_N.dtype == np.int64
    assert (layout.document_N == layout.label_N).all()
    assert (layout.document_N == layout.input_ids_BT.reshape(-1)[layout.loss_index_N]).all()
    first = np.cumsum([0, *(len(row) for row in starts)])
    rows = np.searchsorted(first, layout.document_N, side="right") - 1
    assert (rows == layout.row_N).all()


def test_unpacked_documents_have_lines_of_their_own() -> None:
    layout = lay_out(COUNTING, packed=False)
    assert layout.input_ids_BT[:, :4].tolist() == [
        [10, 11, 12, 13],
        [70, 71, 72, 0],
        [40, 41, 42, 0],
    ]


def test_position_ids_restart_at_documents_and_at_padding() -> None:
    layout = lay_out(COUNTING, packed=True)
    assert layout.position_ids_BT[0, :10].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert layout.position_ids_BT[1, :6].tolist() == [0, 1, 2, 0, 1, 2]


def test_last_tokens_borders_prompts_and_padding_never_have_loss() -> None:
    layout = lay_out(COUNTING, packed=True)
    width = layout.input_ids_BT.shape[1]
    counted = np.zeros((2, width), bool)
    counted.reshape(-1)[layout.loss_index_N] = True
    assert np.flatnonzero(counted[0]).tolist() == [1, 2, 4, 5]  # not 0: prompt, 3: border, 6: last
    assert np.flatnonzero(counted[1]).tolist() == [0, 1]


def test_an_empty_unit_is_one_line_of_padding_without_loss() -> None:
    layout = lay_out(rows([]), packed=True)
    assert layout.input_ids_BT.shape == (1, 32)
    assert len(layout.loss_index_N) == len(layout.label_N) == len(layout.row_N) == 0
    assert layout.position_ids_BT[0].tolist() == list(range(32))


def test_lengths_climb_a_fixed_ladder() -> None:
    lengths = [0, 1, 32, 33, 256, 257, 1024, 1025, 1300]
    assert [padded_length(n) for n in lengths] == [32, 32, 32, 64, 256, 320, 1024, 1280, 1536]
    ladder = [padded_length(n) for n in range(1, 5000)]
    assert ladder == sorted(ladder)
    assert all(rung >= n for n, rung in enumerate(ladder, start=1))


def test_packed_and_unpacked_ask_for_the_same_tokens_in_context() -> None:
    rng = np.random.default_rng(1)
    starts = [np.array([0, 9, 30]), np.array([0, 50])]
    masks = [rng.integers(0, 2, 64).astype(np.uint8) for _ in starts]
    for mask, start in zip(masks, starts, strict=True):
        mask[np.append(start[1:], 64) - 1] = 0
    packed_rows = Rows.build(
        domains=["a"] * 2,
        indices=[0, 1],
        input_ids=[rng.integers(0, 99, 64) for _ in starts],
        doc_starts=starts,
        loss_masks=masks,
    )
    one, many = (lay_out(packed_rows, packed=packed) for packed in (True, False))
    for name in ("label_N", "row_N"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    for name in ("input_ids_BT", "position_ids_BT"):
        views = [getattr(x, name).reshape(-1)[x.loss_index_N] for x in (one, many)]
        np.testing.assert_array_equal(*views)


SWITCHED = Rows.build(
    domains=["a"] * 3,
    indices=range(3),
    input_ids=[np.arange(1, 8), np.arange(1, 60), np.arange(1, 51)],
    doc_starts=[np.array([0, 4]), np.array([0]), np.array([0, 10])],
    loss_masks=[np.append(np.ones(n - 1), 0) for n in (7, 59, 50)],
)


def test_documents_on_two_sides_of_a_switch_share_neither_pass_nor_line() -> None:
    layout = lay_out(SWITCHED, packed=True, passes=Passes(switches=(20,)))
    lengths = (layout.input_ids_BT > 0).sum(1)
    assert lengths.tolist() == [7, 59, 10, 40]
    assert layout.pass_B.tolist() == [0, 1, 0, 1]
    assert layout.width_P.tolist() == [32, 64]
    short, long = layout.parts()
    assert short.position_ids_BT.max() == 9
    assert long.position_ids_BT.max() == 58


@pytest.mark.parametrize("passes", [Passes(padded=False), Passes(padded=False, shared=False)])
def test_unpadded_lines_share_a_pass_with_their_equals_at_most(passes: Passes) -> None:
    equals = Rows.build(
        domains=["a"] * 3,
        indices=range(3),
        input_ids=[np.arange(1, 6), np.arange(1, 9), np.arange(11, 16)],
        doc_starts=[np.array([0])] * 3,
        loss_masks=[np.append(np.ones(n - 1), 0) for n in (5, 8, 5)],
    )
    layout = lay_out(equals, packed=False, passes=passes)
    assert layout.pass_B.tolist() == ([0, 1, 0] if passes.shared else [0, 1, 2])
    assert all((part.input_ids_BT > 0).all() for part in layout.parts())


@pytest.mark.parametrize("passes", [TOGETHER, Passes(switches=(20,)), Passes(padded=False)])
def test_passes_hold_every_position_once(passes: Passes) -> None:
    layout = lay_out(SWITCHED, packed=passes.padded, passes=passes)
    plain = lay_out(SWITCHED, packed=True)
    read = np.zeros(len(plain.label_N), np.int64)
    for part in layout.parts():
        read[part.entry_N] += part.input_ids_BT.reshape(-1)[part.loss_index_N]
    expected = plain.input_ids_BT.reshape(-1)[plain.loss_index_N]
    assert read.tolist() == expected.tolist()
    np.testing.assert_array_equal(layout.label_N, plain.label_N)
    np.testing.assert_array_equal(layout.document_N, plain.document_N)


def test_padding_has_no_position_that_no_document_has() -> None:
    for unit, longest in ((SWITCHED, 59), (SWITCHED.part(slice(0, 1)), 4)):
        assert lay_out(unit, packed=True).position_ids_BT.max() == longest - 1

"""Filling rows with pieces of documents."""

import time

import numpy as np
import pytest

from shared.data.packing import Fit, Piece, pack, pieces_of
from shared.text.framing import Encoded


def pieces(lengths: list[int]) -> list[Piece]:
    """A piece per length whose ids name it."""
    return [
        Piece(i, np.full(n, i, np.int32), np.r_[np.ones(n - 1), 0].astype(np.uint8))
        for i, n in enumerate(lengths)
    ]


def document(length: int, *, prompt: int = 0) -> Encoded:
    """A document whose ids count upwards and whose first `prompt` tokens are not learnt."""
    mask = np.ones(length, np.uint8)
    mask[: max(0, prompt - 1)] = 0
    mask[-1] = 0
    return Encoded(1, "a:1", np.arange(length, dtype=np.int32), mask, length)


@pytest.mark.parametrize("seed", range(5))
def test_every_piece_lands_whole_in_one_row_behind_its_start(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(2, 65, 400).tolist()
    rows = pack(pieces(lengths), context=64)
    found = []
    for ids, starts, mask in zip(rows.input_ids, rows.doc_starts, rows.loss_masks, strict=True):
        assert len(ids) == len(mask) <= 64
        for part, counted in zip(
            np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True
        ):
            assert len(set(part.tolist())) == 1
            assert counted.tolist() == [1] * (len(part) - 1) + [0]
            found.append((int(part[0]), len(part)))
    assert sorted(found) == list(enumerate(lengths))


def test_rows_are_nearly_full_for_lengths_of_real_text() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 5000).clip(2, 512).astype(int)
    rows = pack(pieces(lengths.tolist()), context=512)
    assert lengths.sum() / (512 * len(rows)) > 0.97


def test_packing_costs_little_beside_tokenising() -> None:
    many = pieces([20] * 20_000)
    start = time.perf_counter()
    pack(many, context=512)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("length", "expected"), [(64, [64]), (65, [63, 2]), (130, [64, 64, 2])])
def test_a_split_document_loses_one_prediction_at_each_border_and_keeps_its_end(
    length: int, expected: list[int]
) -> None:
    fit = Fit()
    cut = list(pieces_of([document(length)], context=64, too_long="split", fit=fit))
    assert [len(piece.input_ids) for piece in cut] == expected
    assert all(piece.loss_mask[-1] == 0 for piece in cut)
    assert fit == Fit(documents=1, too_long=int(length > 64), without_loss=0)
    start = 0
    for piece in cut:  # the tokens of a piece follow those of the one before
        assert piece.input_ids[0] == start
        start += len(piece.input_ids)


def test_pieces_of_a_prompt_alone_are_dropped_and_the_response_is_kept() -> None:
    fit = Fit()
    kept = list(pieces_of([document(150, prompt=70)], context=64, too_long="split", fit=fit))
    assert [int(piece.input_ids[0]) for piece in kept] == [64, 128]
    assert fit.without_loss == 0
    cut = list(pieces_of([document(150, prompt=70)], context=64, too_long="cut", fit=fit))
    assert cut == []
    assert fit.without_loss == 1


def test_masks_of_the_document_are_left_as_they_were() -> None:
    whole = document(130)
    list(pieces_of([whole], context=64, too_long="split", fit=Fit()))
    assert whole.loss_mask.sum() == 129

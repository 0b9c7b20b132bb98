"""Laws of the curriculum: every row in one part, each part once per epoch, shares as asked."""

from pathlib import Path

import numpy as np
import pytest

from shared.data.row_store import RowStore, write_rows
from shared.errors import DataError
from shared.mixture.blocks import DomainSize, Mixture
from shared.mixture.curriculum import (
    Curriculum,
    DomainParts,
    part_edges,
    part_shares,
    parts_of,
    whole_domain,
    write_order,
)
from shared.mixture.weight_log import WeightEntry, WeightLog
from tests.student_trainer.runs import ragged_rows

NAMES = ("math", "code")
SIZES = (61, 203)
PHASES = 3
REPLAY = 0.2
BEGUN = (0, 40, 90)  # first block of each phase
WEIGHTS = ((0.5, 0.5), (0.3, 0.7), (0.8, 0.2))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[RowStore]:
    """Ragged rows of two domains on disk, and an order of each beside them."""
    folder, opened = tmp_path_factory.mktemp("rows"), []
    for seed, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        write_rows(folder / f"{name}.arrow", domain=name, rows=ragged_rows(seed, count=size))
        difficulty_R = np.random.default_rng(seed).normal(size=size)
        write_order(folder / f"{name}.npy", difficulty_R)
        opened.append(RowStore.open(folder / f"{name}.arrow"))
    return opened


def _parts(store: RowStore, parts: int = PHASES) -> DomainParts:
    path = Path(store.path)
    order_path = path.with_suffix(".npy")
    return parts_of(path.stem, store=store, order_path=order_path, parts=parts)


def _log(phases: tuple[int, ...] = (0, 1, 2)) -> WeightLog:
    entries = [
        WeightEntry(index, block, block, weights, phase=phase)
        for index, (block, weights, phase) in enumerate(zip(BEGUN, WEIGHTS, phases, strict=True))
    ]
    return WeightLog(NAMES, tuple(entries))


def _curriculum(
    stores: list[RowStore], log: WeightLog, *, seed: int = 5, replay: float = REPLAY
) -> Curriculum:
    domains = [_parts(store) for store in stores]
    return Curriculum(seed=seed, domains=domains, rows_per_block=16, log=log, replay=replay)


def _part_of_row(parts: DomainParts) -> np.ndarray:
    """Part of each row of the file."""
    assert parts.order_R is not None
    part_R = np.empty(parts.num_rows, np.int64)
    part_R[parts.order_R] = np.repeat(np.arange(PHASES), parts.num_rows_P)
    return part_R


def test_an_order_is_ascending_and_keeps_ties_as_they_were(tmp_path: Path) -> None:
    write_order(tmp_path / "order.npy", np.array([2.0, 1.0, 2.0, 0.5, 1.0]))
    order_R = np.load(tmp_path / "order.npy")
    assert order_R.dtype == np.int64
    assert order_R.tolist() == [3, 1, 4, 0, 2]


def test_a_difficulty_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="difficulty of row 1 is nan"):
        write_order(tmp_path / "order.npy", np.array([1.0, np.nan]))
    assert not (tmp_path / "order.npy").exists()


@pytest.mark.parametrize("content", [b"", b"no order", None, [0, 0, 1], [0, 1], [0.0, 1.0, 2.0]])
def test_a_file_that_is_no_order_is_refused(tmp_path: Path, content: object) -> None:
    write_rows(tmp_path / "a.arrow", domain="a", rows=ragged_rows(0, count=3))
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, np.array(content))
    with pytest.raises(DataError, match=r"a.npy is no .*order .* remove it and start again"):
        _parts(RowStore.open(tmp_path / "a.arrow"))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(10))
def test_parts_are_as_equal_as_whole_rows_allow(parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens_R = rng.integers(1, 500, int(rng.integers(parts, 300)))
    edges = part_edges(tokens_R, parts=parts)
    assert edges[0] == 0
    assert edges[-1] == len(tokens_R)
    assert (np.diff(edges) >= 1).all()
    if len(tokens_R) > 100:
        wanted = tokens_R.sum() * np.arange(parts + 1) / parts
        before = np.concatenate([[0], np.cumsum(tokens_R)])
        assert np.abs(before[edges] - wanted).max() <= tokens_R.max() / 2


def test_one_long_row_leaves_the_other_parts_a_row_each() -> None:
    for place in range(4):
        tokens_R = np.ones(4, np.int64)
        tokens_R[place] = 10**6
        assert part_edges(tokens_R, parts=4).tolist() == [0, 1, 2, 3, 4]


def test_parts_have_the_counts_and_means_of_their_rows(stores: list[RowStore]) -> None:
    for store in stores:
        parts, tokens_R = _parts(store), store.take(range(len(store))).num_loss_tokens()
        part_R = _part_of_row(parts)
        for part in range(PHASES):
            own = tokens_R[part_R == part]
            assert parts.num_rows_P[part] == len(own)
            assert parts.mean_loss_tokens_P[part] == pytest.approx(own.mean())


def test_shares_go_to_the_new_part_and_replay_to_those_before() -> None:
    tokens_DP = np.array([[10.0, 20.0, 30.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    for phase in range(4):
        share_DP = part_shares(tokens_DP, phase=phase, replay=0.3)
        np.testing.assert_allclose(share_DP.sum(1), 1, atol=1e-15)
        assert (share_DP[:, phase + 1 :] == 0).all()
        np.testing.assert_allclose(share_DP[:, phase], 0.7 if phase else 1.0)
    np.testing.assert_allclose(share_DP[0, :3], [0.05, 0.1, 0.15])
    assert (part_shares(tokens_DP, phase=2, replay=0.0)[:, :2] == 0).all()


def test_without_phases_the_draw_is_the_mixtures_bit_for_bit() -> None:
    log = WeightLog(NAMES, tuple(WeightEntry(i, 7 * i, 7 * i, w) for i, w in enumerate(WEIGHTS)))
    tokens = (4000, 9000)
    whole = [
        whole_domain(name, num_rows=size, num_loss_tokens=count)
        for name, size, count in zip(NAMES, SIZES, tokens, strict=True)
    ]
    sizes = [DomainSize(n, s, t / s) for n, s, t in zip(NAMES, SIZES, tokens, strict=True)]
    curriculum = Curriculum(seed=3, domains=whole, rows_per_block=16, log=log)
    mixture = Mixture(seed=3, domains=sizes, rows_per_block=16, log=log)
    for block in range(40):
        drawn, expected = curriculum.block(block), mixture.block(block)
        assert np.array_equal(drawn.domain_index_R, expected.domain_index_R)
        assert np.array_equal(drawn.row_index_R, expected.row_index_R)
        assert np.array_equal(drawn.epoch_R, expected.epoch_R)
    assert curriculum.epochs(40) == tuple((mixture.rows_drawn(40) / SIZES).tolist())


def test_a_phase_draws_its_part_and_those_before_and_never_a_later_one(
    stores: list[RowStore],
) -> None:
    curriculum = _curriculum(stores, _log())
    part_of_row = [_part_of_row(_parts(store)) for store in stores]
    for block in range(140):
        drawn, phase = curriculum.block(block), sum(block >= first for first in BEGUN) - 1
        for domain, part_R in enumerate(part_of_row):
            rows = drawn.row_index_R[drawn.domain_index_R == domain]
            assert (part_R[rows] <= phase).all()


def test_every_row_of_a_part_comes_once_per_epoch(stores: list[RowStore]) -> None:
    curriculum = _curriculum(stores, _log())
    blocks = [curriculum.block(block) for block in range(400)]
    columns = ("domain_index_R", "epoch_R", "row_index_R")
    drawn = np.concatenate([np.stack([getattr(b, c) for c in columns], 1) for b in blocks])
    assert len(np.unique(drawn, axis=0)) == len(drawn)
    for domain, store in enumerate(stores):
        part_R = _part_of_row(_parts(store))
        own = drawn[drawn[:, 0] == domain]
        for part in range(PHASES):
            epochs = own[part_R[own[:, 2]] == part][:, 1]
            full, rest = divmod(len(epochs), int((part_R == part).sum()))
            assert full >= 2
            counts = np.bincount(epochs).tolist()
            assert counts == [(part_R == part).sum()] * full + [rest] * (rest > 0)


@pytest.mark.parametrize(
    "replay", [0.2, *(pytest.param(share, marks=pytest.mark.drill) for share in (0.0, 0.5))]
)
def test_realised_loss_tokens_keep_to_domain_weights_and_replay(
    stores: list[RowStore], replay: float
) -> None:
    curriculum = _curriculum(stores, _log(), replay=replay)
    tokens = [store.loss_tokens() for store in stores]
    part_of_row = [_part_of_row(_parts(store)) for store in stores]
    for phase, (first, stop) in enumerate(((0, 40), (40, 90), (90, 900))):
        sums_DP = np.zeros((2, PHASES))
        for block in range(first, stop):
            drawn = curriculum.block(block)
            for d in range(2):
                rows = drawn.row_index_R[drawn.domain_index_R == d]
                np.add.at(sums_DP[d], part_of_row[d][rows], tokens[d][rows])
        total = sums_DP.sum()
        slack = 0.01 if stop == 900 else 0.03
        assert np.abs(sums_DP.sum(1) / total - WEIGHTS[phase]).max() < slack
        replayed = sums_DP[:, :phase].sum() / total
        assert abs(replayed - (replay if phase else 0)) < slack
        assert (sums_DP[:, phase + 1 :] == 0).all()


def test_a_growing_log_changes_no_block_and_a_fresh_object_draws_the_same(
    stores: list[RowStore],
) -> None:
    log, entries = _log(), _log().entries
    grown = _curriculum(stores, WeightLog(NAMES, entries[:1]))
    before = [grown.block(block).row_index_R for block in range(BEGUN[1])]
    for known in (2, 3):
        grown = grown.with_log(WeightLog(NAMES, entries[:known]))
    fresh = _curriculum(stores, log)
    for block in range(120):
        assert np.array_equal(grown.block(block).row_index_R, fresh.block(block).row_index_R)
    assert all(np.array_equal(grown.block(b).row_index_R, before[b]) for b in range(BEGUN[1]))
    assert grown.epochs(120) == fresh.epochs(120)


def test_epochs_are_rows_drawn_over_rows(stores: list[RowStore]) -> None:
    curriculum = _curriculum(stores, _log())
    drawn = np.concatenate([curriculum.block(block).domain_index_R for block in range(100)])
    assert curriculum.epochs(100) == tuple(np.bincount(drawn) / SIZES)
    assert curriculum.epochs(0) == (0.0, 0.0)


def test_the_order_has_an_identity(stores: list[RowStore], tmp_path: Path) -> None:
    one, other = (_parts(store) for store in stores)
    assert one.digest == _parts(stores[0]).digest != other.digest
    write_order(tmp_path / "math.npy", -np.arange(SIZES[0], dtype=float))
    moved = parts_of("math", store=stores[0], order_path=tmp_path / "math.npy", parts=PHASES)
    assert moved.digest != one.digest

"""Laws of the draw: pure, exact, once per epoch, and in the shares the weights ask for."""

import pickle
import time

import numpy as np
import pytest

from shared.errors import DataError
from shared.mixture.blocks import Block, DomainSize, Mixture
from shared.mixture.weight_log import WeightEntry, WeightLog

NAMES = ("math", "code", "law", "tales")
SIZES = (37, 211, 5, 120)


def _log(*entries: tuple[int, tuple[float, ...]], names: tuple[str, ...] = NAMES) -> WeightLog:
    """A log from (effective_from, weights) pairs."""
    return WeightLog(
        names,
        tuple(
            WeightEntry(index=i, decided_at=block, effective_from=block, weights=weights)
            for i, (block, weights) in enumerate(entries)
        ),
    )


def _mixture(
    log: WeightLog,
    *,
    seed: int = 3,
    sizes: tuple[int, ...] = SIZES,
    means: tuple[float, ...] = (40.0, 100.0, 250.0, 80.0),
    rows: int = 16,
) -> Mixture:
    domains = [DomainSize(*d) for d in zip(log.domains, sizes, means, strict=True)]
    return Mixture(seed=seed, domains=domains, rows_per_block=rows, log=log)


THREE = _log((0, (0.4, 0.3, 0.2, 0.1)), (7, (0.1, 0.6, 0.0, 0.3)), (30, (0.25, 0.25, 0.49, 0.01)))


def _same(a: Block, b: Block) -> bool:
    return (
        np.array_equal(a.domain_index_R, b.domain_index_R)
        and np.array_equal(a.row_index_R, b.row_index_R)
        and np.array_equal(a.epoch_R, b.epoch_R)
    )


def _counts(mixture: Mixture, block: int) -> np.ndarray:
    return np.bincount(mixture.block(block).domain_index_R, minlength=len(mixture.log.domains))


def test_a_block_is_the_same_in_any_order_of_calls_and_in_a_fresh_object() -> None:
    forward = [_mixture(THREE).block(b) for b in range(60)]
    mixture = _mixture(THREE)
    for b in reversed(range(60)):
        assert _same(mixture.block(b), forward[b])
    assert _same(pickle.loads(pickle.dumps(mixture)).block(41), forward[41])


def test_a_draw_stays_what_it_was_in_every_release() -> None:
    block = _mixture(THREE).block(8)
    assert block.domain_index_R.tolist() == [0, 1, 1, 3, 0, 1, 1, 3, 1, 1, 3, 3, 1, 3, 0, 1]
    assert block.row_index_R[:8].tolist() == [33, 133, 173, 2, 30, 37, 98, 25]


def test_every_block_is_full_and_counts_add_up_to_rows_drawn() -> None:
    mixture = _mixture(THREE)
    drawn_D = np.zeros(4, np.int64)
    for b in range(60):
        assert np.array_equal(mixture.rows_drawn(b), drawn_D)
        drawn_D += _counts(mixture, b)
        assert drawn_D.sum() == 16 * (b + 1)


def test_every_row_comes_exactly_once_per_epoch_whatever_the_weights_do() -> None:
    mixture = _mixture(THREE)
    blocks = [mixture.block(b) for b in range(900)]
    triples = np.concatenate(
        [np.stack([b.domain_index_R, b.epoch_R, b.row_index_R], 1) for b in blocks]
    )
    assert len(np.unique(triples, axis=0)) == len(triples)
    for domain, size in enumerate(SIZES):
        own = triples[triples[:, 0] == domain]
        assert own[:, 2].min() >= 0
        assert own[:, 2].max() < size
        full, rest = divmod(len(own), size)
        per_epoch = np.bincount(own[:, 1])
        assert full >= 2
        assert per_epoch.tolist() == [size] * full + [rest] * (rest > 0)


def test_epochs_and_domains_have_orders_of_their_own() -> None:
    log = _log((0, (1.0,)), names=("math",))
    mixture = _mixture(log, sizes=(64,), means=(10.0,), rows=64)
    orders = [mixture.block(b).row_index_R for b in range(3)]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    other = _mixture(_log((0, (1.0,)), names=("code",)), sizes=(64,), means=(10.0,), rows=8)
    first = _mixture(log, sizes=(64,), means=(10.0,), rows=8).block(0)
    assert not np.array_equal(other.block(0).row_index_R, first.row_index_R)


def test_seeds_differ_in_rows_and_order_but_not_in_counts() -> None:
    one, two = _mixture(THREE, seed=1), _mixture(THREE, seed=2)
    assert not np.array_equal(one.block(3).row_index_R, two.block(3).row_index_R)
    assert not np.array_equal(one.block(3).domain_index_R, two.block(3).domain_index_R)
    assert np.array_equal(_counts(one, 3), _counts(two, 3))


def test_a_growing_log_changes_no_block_already_ruled() -> None:
    short = _mixture(WeightLog(NAMES, THREE.entries[:1]))
    before = [short.block(b) for b in range(30)]
    grown = short.with_log(WeightLog(NAMES, THREE.entries[:2])).with_log(THREE)
    assert all(_same(grown.block(b), before[b]) for b in range(7))
    assert not _same(grown.block(7), before[7])
    assert all(_same(grown.block(b), _mixture(THREE).block(b)) for b in range(60))
    assert all(_same(short.block(b), before[b]) for b in range(30))


def test_a_domain_without_weight_is_never_drawn_even_between_others() -> None:
    log = _log((0, (0.5, 0.0, 0.5, 0.0)), (3, (0.0, 0.0, 0.0, 1.0)), (5, (0.0, 0.7, 0.0, 0.3)))
    counts = np.array([_counts(_mixture(log), b) for b in range(40)])
    assert (counts[:3, [1, 3]] == 0).all()
    assert (counts[3:5] == [0, 0, 0, 16]).all()
    assert (counts[5:, [0, 2]] == 0).all()


@pytest.mark.parametrize("num_domains", [1, 2, 3, 10, 100])
def test_quotas_stay_within_half_a_row_per_tree_level(num_domains: int) -> None:
    rng = np.random.default_rng(num_domains)
    weights_D = rng.dirichlet(np.full(num_domains, 0.3))
    means_D = rng.uniform(20, 500, num_domains)
    share_D = weights_D / means_D / (weights_D / means_D).sum()
    names = tuple(f"d{i}" for i in range(num_domains))
    mixture = _mixture(
        _log((0, tuple(weights_D)), names=names),
        sizes=(1000,) * num_domains,
        means=tuple(means_D),
        rows=1,
    )
    levels = (num_domains - 1).bit_length()
    last_D = mixture.rows_drawn(0)
    for block in [*range(1, 500), 10**6, 10**9, 10**12]:
        drawn_D = mixture.rows_drawn(block)
        assert drawn_D.sum() == block
        assert (drawn_D >= last_D).all()
        slack = 1e-3 + block * 2.0**-41 * levels
        assert np.abs(drawn_D - block * share_D).max() <= levels / 2 + slack
        last_D = drawn_D


def test_realised_loss_tokens_keep_to_the_weights_with_ragged_rows_and_a_weight_of_a_thousandth():
    rng = np.random.default_rng(0)
    weights = (0.001, 0.099, 0.3, 0.6)
    lengths = [
        np.clip(rng.lognormal(mean, 0.5, size), 1, 512).astype(int)
        for mean, size in ((3.5, 100), (5.5, 5000), (4.0, 900), (5.0, 20_000))
    ]
    mixture = _mixture(
        _log((0, weights)),
        sizes=tuple(len(n) for n in lengths),
        means=tuple(float(n.mean()) for n in lengths),
        rows=512,
    )
    tokens_D = np.zeros(4)
    for b in range(300):
        block = mixture.block(b)
        for domain, own in enumerate(lengths):
            tokens_D[domain] += own[block.row_index_R[block.domain_index_R == domain]].sum()
    assert np.abs(tokens_D / tokens_D.sum() / weights - 1).max() < 0.02


def test_weights_that_change_often_leave_no_domain_behind() -> None:
    """Each entry rules 8 rows, of which a share of 1 % is owed a twelfth of a row."""
    swing = ((0.01, 0.49, 0.3, 0.2), (0.01, 0.29, 0.2, 0.5))
    log = _log(*((b, swing[b % 2]) for b in range(4000)))
    drawn_D = _mixture(log, means=(50.0,) * 4, rows=8).rows_drawn(4000)
    asked_D = 8 * 2000 * np.sum(swing, axis=0)
    assert np.abs(drawn_D / asked_D - 1).max() < 0.02


def test_a_domain_of_a_billion_rows_costs_nothing() -> None:
    log = _log((0, (0.5, 0.5)), names=("web", "books"))
    mixture = _mixture(log, sizes=(10**9, 3 * 10**9), means=(500.0, 500.0), rows=1024)
    start = time.perf_counter()
    rows = [mixture.block(b) for b in (0, 1, 10**7)]
    assert time.perf_counter() - start < 1.0
    assert max(int(b.row_index_R.max()) for b in rows) > 2 * 10**9
    assert rows[2].epoch_R.max() == 5


def test_a_thousand_domains_take_milliseconds() -> None:
    names = tuple(f"d{i}" for i in range(1000))
    weights = np.random.default_rng(0).dirichlet(np.ones(1000))
    mixture = _mixture(
        _log((0, tuple(weights)), names=names),
        sizes=(10**6,) * 1000,
        means=(300.0,) * 1000,
        rows=512,
    )
    start = time.perf_counter()
    for b in range(20):
        mixture.block(10**6 + b)
    assert (time.perf_counter() - start) / 20 < 0.05


def test_a_domain_without_loss_tokens_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="domain law has 0 training rows"):
        _mixture(THREE, sizes=(37, 211, 0, 120))
    with pytest.raises(DataError, match="domain code"):
        _mixture(THREE, means=(40.0, 0.0, 250.0, 80.0))

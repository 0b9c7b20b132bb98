"""The curriculum: which part of each domain a phase draws, mapped onto the mixture.

A domain's rows, ordered by difficulty, are cut into one part per phase. The mixture deals rows to
cells, one for each (domain, part), under cell weights that follow from the domain weights and the
phase in force, so that phase changes are part of the same replayable order. Without phases every
domain is one part, in the order of its file.

D domains in config order   P parts of a domain, easiest first   R rows of a domain or a block
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from shared.data.row_store import RowStore
from shared.errors import DataError
from shared.mixture.blocks import Block, DomainSize, Mixture
from shared.mixture.weight_log import WeightEntry, WeightLog


def write_order(path: Path, difficulty_R: np.ndarray) -> None:
    """Write a domain's rows from easy to difficult, int64 [R]; ties stay in the file's order.

    The file is whole or not there. Raises DataError for a difficulty that is not a number.
    """
    bad_R = np.flatnonzero(~np.isfinite(difficulty_R))
    if len(bad_R):
        raise DataError(
            f"the difficulty of row {bad_R[0]} is {difficulty_R[bad_R[0]]}; look at the model that "
            "measured it, or take progressive.difficulty=length"
        )
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            np.save(file, np.argsort(difficulty_R, kind="stable").astype(np.int64))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class DomainParts:
    """A domain's training rows in parts of nearly equal loss tokens, easiest first."""

    name: str
    order_R: np.ndarray | None  # row of each place from easy to difficult; None: as in the file
    first_P: tuple[int, ...]  # place at which each part begins
    num_rows_P: tuple[int, ...]
    mean_loss_tokens_P: tuple[float, ...]  # per row
    digest: str | None = None  # identity of the order

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(self.num_rows_P)


def whole_domain(name: str, *, num_rows: int, num_loss_tokens: int) -> DomainParts:
    """A domain in one part."""
    return DomainParts(name, None, (0,), (num_rows,), (num_loss_tokens / max(1, num_rows),))


def parts_of(name: str, *, store: RowStore, order_path: Path, parts: int) -> DomainParts:
    """A domain cut into parts along the order of `write_order`.

    Raises DataError where the file is missing or no order of these rows.
    """
    order_R = _read_order(order_path, num_rows=len(store))
    tokens_R = store.loss_tokens()[order_R]
    edges = part_edges(tokens_R, parts=parts)
    counts = np.diff(edges)
    means = np.add.reduceat(tokens_R, edges[:-1]) / counts
    return DomainParts(
        name=name,
        order_R=order_R,
        first_P=tuple(edges[:-1].tolist()),
        num_rows_P=tuple(counts.tolist()),
        mean_loss_tokens_P=tuple(means.tolist()),
        digest=xxhash.xxh3_64_hexdigest(order_R.data),
    )


def part_edges(tokens_R: np.ndarray, *, parts: int) -> np.ndarray:
    """Where to cut ordered rows so that loss tokens are as equal as whole rows allow, int64 [P+1].

    Every part has a row at least, of which there must be as many as parts.
    """
    num_rows = len(tokens_R)
    assert num_rows >= parts, "a domain has a row for each part"
    before = np.concatenate([[0], np.cumsum(tokens_R)])
    wanted = before[-1] * np.arange(parts + 1) / parts
    above = np.searchsorted(before, wanted).clip(1, num_rows)
    nearer = wanted - before[above - 1] < before[above] - wanted
    edges, ascending = above - nearer, np.arange(parts + 1)
    edges = np.maximum.accumulate(np.maximum(edges, ascending) - ascending) + ascending
    return np.minimum(edges, num_rows - ascending[::-1])


def part_shares(tokens_DP: np.ndarray, *, phase: int, replay: float) -> np.ndarray:
    """Each part's share of its domain's loss tokens in a phase, float64 [D, P], rows of sum 1.

    The part of the phase gets 1 - `replay`; those before it share `replay` by their loss tokens,
    later ones get nothing. There is nothing to replay in phase 0.
    """
    share_DP = np.zeros(tokens_DP.shape)
    if phase:
        before_DP = tokens_DP[:, :phase]
        share_DP[:, :phase] = replay * before_DP / before_DP.sum(1, keepdims=True)
    share_DP[:, phase] = 1 - share_DP[:, :phase].sum(1)
    return share_DP


class Curriculum:
    """Draws blocks of rows under a log of domain weights and phases, as `Mixture` does for cells.

    All domains have the same number of parts.
    """

    def __init__(
        self,
        *,
        seed: int,
        domains: Sequence[DomainParts],
        rows_per_block: int,
        log: WeightLog,
        replay: float = 0.0,
    ) -> None:
        self._domains, self._parts = tuple(domains), len(domains[0].first_P)
        rows_DP = np.array([domain.num_rows_P for domain in domains])
        tokens_DP = rows_DP * np.array([domain.mean_loss_tokens_P for domain in domains])
        self._shares = [
            part_shares(tokens_DP, phase=phase, replay=replay) for phase in range(self._parts)
        ]
        cells = [cell for domain in domains for cell in _cells(domain)]
        names = tuple(cell.name for cell in cells)
        self._mixture = Mixture(
            seed=seed,
            domains=cells,
            rows_per_block=rows_per_block,
            log=WeightLog(names, self._cell_entries(log.entries)),
        )
        self.log = log

    def with_log(self, log: WeightLog) -> "Curriculum":
        """The same curriculum under a longer log; no block already ruled changes."""
        known = len(self.log.entries)
        assert log.entries[:known] == self.log.entries, "the weight log only grows"
        cells, longer = self._mixture.log, copy.copy(self)
        entries = (*cells.entries, *self._cell_entries(log.entries[known:]))
        longer._mixture = self._mixture.with_log(WeightLog(cells.domains, entries))
        longer.log = log
        return longer

    def block(self, block: int) -> Block:
        """The rows of block `block`, counted from 0. Epochs are those of the row's part."""
        drawn = self._mixture.block(block)
        domain_R, part_R = np.divmod(drawn.domain_index_R, self._parts)
        row_R = drawn.row_index_R.copy()
        for index in np.unique(domain_R):
            domain = self._domains[index]
            if domain.order_R is not None:
                own_R = domain_R == index
                place_R = np.array(domain.first_P)[part_R[own_R]] + row_R[own_R]
                row_R[own_R] = domain.order_R[place_R]
        return Block(domain_R, row_R, drawn.epoch_R)

    def rows_drawn(self, block: int) -> np.ndarray:
        """Rows of each domain in all blocks before `block`, int64 [D]."""
        return self._mixture.rows_drawn(block).reshape(-1, self._parts).sum(1)

    def epochs(self, block: int) -> tuple[float, ...]:
        """Rows drawn in all blocks before `block` over the domain's rows, one per domain."""
        return tuple(
            int(drawn) / domain.num_rows
            for drawn, domain in zip(self.rows_drawn(block), self._domains, strict=True)
        )

    def _cell_entries(self, entries: Sequence[WeightEntry]) -> tuple[WeightEntry, ...]:
        return tuple(replace(e, weights=self._cell_weights(e), factors=None) for e in entries)

    def _cell_weights(self, entry: WeightEntry) -> tuple[float, ...]:
        weight_DP = np.array(entry.weights)[:, None] * self._shares[entry.phase]
        return tuple(weight_DP.ravel().tolist())


def _cells(domain: DomainParts) -> list[DomainSize]:
    """A domain in one part keeps its name, and so its order."""
    names = [domain.name]
    if len(domain.first_P) > 1:
        names = [f"{domain.name}#{part}" for part in range(len(domain.first_P))]
    sizes = zip(names, domain.num_rows_P, domain.mean_loss_tokens_P, strict=True)
    return [DomainSize(*size) for size in sizes]


def _read_order(path: Path, *, num_rows: int) -> np.ndarray:
    try:
        order_R = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is no readable order of rows ({str(error).splitlines()[0]}); remove it and "
            "start again, it is made anew"
        ) from None
    if order_R.dtype != np.int64 or not np.array_equal(np.sort(order_R), np.arange(num_rows)):
        raise DataError(
            f"{path} is no order of the {num_rows} rows of its domain; remove it and start again, "
            "it is made anew"
        )
    return order_R

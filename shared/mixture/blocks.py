"""The mixture: which rows make up a block, as a pure function of (seed, weight log, block).

A block is one optimiser step's rows. Weights are shares of loss tokens, so a domain's share of the
rows is its weight over its mean loss tokens per row, renormalised. Rows are dealt down a binary
tree of domains: a node passes its n-th row to the left when `n * share` passes an integer. The
fraction left over is carried on to the next block and the next weight entry, so that small weights
are served across both. Knows nothing of text, ranks or teachers.

R rows of a block   D domains in config order
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import DataError
from shared.mixture.weight_log import WeightEntry, WeightLog
from shared.permutation import key_of, mixed, permuted, shuffled

_ONE = 2**40  # shares and carried fractions are integers in units of 1 / _ONE


@dataclass(frozen=True, slots=True)
class DomainSize:
    """What the mixture must know of a domain's training rows."""

    name: str
    num_rows: int
    mean_loss_tokens: float  # per row


@dataclass(frozen=True, slots=True)
class Block:
    """One optimiser step's rows, in order; int64 each."""

    domain_index_R: np.ndarray
    row_index_R: np.ndarray  # position in the domain's file
    epoch_R: np.ndarray  # times the domain was exhausted before


@dataclass(frozen=True, slots=True)
class _Reign:
    """Where a weight entry takes over. Nodes are numbered as in a heap, the root is 1."""

    first_block: int
    left_shares: tuple[int, ...]  # of a node's rows, for its left child; 1 / _ONE
    carries: tuple[int, ...]  # fraction of a row that each left child is owed; 1 / _ONE
    drawn_D: np.ndarray  # rows of each domain before first_block

    def dealt(self, rows: int) -> tuple[list[int], list[int]]:
        """The first `rows` rows of this reign by domain (and padding), and the carries then.

        Python integers: `rows * share` outgrows 64 bits. One row more adds one row to exactly one
        domain; a domain is within half a row per level of the tree of its exact quota.
        """
        num_leaves = len(self.left_shares)
        counts, carries = [0, rows] + [0] * (2 * num_leaves - 2), list(self.carries)
        for node in range(1, num_leaves):
            owed = counts[node] * self.left_shares[node] + carries[node]
            counts[2 * node], carries[node] = divmod(owed, _ONE)
            counts[2 * node + 1] = counts[node] - counts[2 * node]
        return counts[num_leaves:], carries


class Mixture:
    """Draws blocks. Any order of calls and any process get the same rows."""

    def __init__(
        self, *, seed: int, domains: Sequence[DomainSize], rows_per_block: int, log: WeightLog
    ) -> None:
        for domain in domains:
            if domain.num_rows < 1 or domain.mean_loss_tokens <= 0:
                raise DataError(
                    f"domain {domain.name} has {domain.num_rows} training rows with "
                    f"{domain.mean_loss_tokens:g} loss tokens each; give it text or take it out"
                )
        assert log.domains == tuple(d.name for d in domains), "the log names the same domains"
        self._seed = seed
        self._rows_per_block = rows_per_block
        self._num_rows_D = np.array([d.num_rows for d in domains], np.int64)
        self._mean_loss_tokens_D = np.array([d.mean_loss_tokens for d in domains])
        self._key_D = np.array([key_of(seed, "domain", d.name) for d in domains], np.uint64)
        self._reigns = self._with_reigns((), log.entries)
        self.log = log

    def with_log(self, log: WeightLog) -> "Mixture":
        """The same mixture under a longer log; no block already ruled changes."""
        known = len(self.log.entries)
        assert log.entries[:known] == self.log.entries, "the weight log only grows"
        longer = copy.copy(self)
        longer._reigns = self._with_reigns(self._reigns, log.entries[known:])
        longer.log = log
        return longer

    def block(self, block: int) -> Block:
        """The rows of block `block`, counted from 0."""
        reign = self._ruling(block)
        before_D, after_D = self._dealt(reign, block), self._dealt(reign, block + 1)
        num_D = after_D - before_D
        domain_R = np.repeat(np.arange(len(num_D)), num_D)
        rank_R = np.arange(self._rows_per_block) - (np.cumsum(num_D) - num_D)[domain_R]
        position_R = (reign.drawn_D + before_D)[domain_R] + rank_R
        size_R = self._num_rows_D[domain_R]
        epoch_R, offset_R = np.divmod(position_R, size_R)
        key_R = mixed(self._key_D[domain_R], epoch_R)
        row_R = permuted(offset_R, size_n=size_R, key_n=key_R)
        order_R = shuffled(self._rows_per_block, key=key_of(self._seed, "block", block))
        return Block(domain_R[order_R], row_R[order_R], epoch_R[order_R])

    def rows_drawn(self, block: int) -> np.ndarray:
        """Rows of each domain in all blocks before `block`, int64 [D]; epochs are these over
        `num_rows`."""
        if block == 0:
            return np.zeros_like(self._num_rows_D)
        reign = self._ruling(block - 1)
        return reign.drawn_D + self._dealt(reign, block)

    def _dealt(self, reign: _Reign, block: int) -> np.ndarray:
        """Rows of each domain from the reign's first block up to before `block`."""
        counts, _ = reign.dealt((block - reign.first_block) * self._rows_per_block)
        return np.array(counts[: len(self._num_rows_D)], np.int64)

    def _ruling(self, block: int) -> _Reign:
        entry = self.log.ruling(block)
        return self._reigns[entry.index]

    def _with_reigns(
        self, reigns: tuple[_Reign, ...], entries: Sequence[WeightEntry]
    ) -> tuple[_Reign, ...]:
        for entry in entries:
            shares = _left_shares(np.array(entry.weights) / self._mean_loss_tokens_D)
            if reigns:
                last = reigns[-1]
                rows = (entry.effective_from - last.first_block) * self._rows_per_block
                assert rows >= 0, "entries ascend in effective_from"
                _, carries = last.dealt(rows)
                drawn_D = last.drawn_D + self._dealt(last, entry.effective_from)
            else:
                assert entry.effective_from == 0, "the first entry rules from block 0"
                carries, drawn_D = [_ONE // 2] * len(shares), np.zeros_like(self._num_rows_D)
            reigns = (*reigns, _Reign(entry.effective_from, shares, tuple(carries), drawn_D))
        return reigns


def _left_shares(row_shares_D: np.ndarray) -> tuple[int, ...]:
    """Each node's share for its left child; 0 without weight on the left, _ONE without any on the
    right, so that a domain without weight is never drawn."""
    num_leaves = 1 << (len(row_shares_D) - 1).bit_length()
    padding = [0.0] * (num_leaves - len(row_shares_D))
    mass = [0.0] * num_leaves + row_shares_D.tolist() + padding
    for node in range(num_leaves - 1, 0, -1):
        mass[node] = mass[2 * node] + mass[2 * node + 1]
    assert 0 < mass[1] < np.inf, "weights are finite and not all zero"
    return tuple(
        round(_ONE * mass[2 * node] / mass[node]) if node and mass[node] else 0
        for node in range(num_leaves)
    )

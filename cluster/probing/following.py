"""A step followed operation by operation: bytes that live, and the widest part of a vocabulary.

N positions   V head rows   D hidden width
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cluster.sizing.alive import Alive, held


@dataclass(frozen=True, slots=True)
class Chunks:
    """The limit that a side keeps: no tensor [n, V] with more positions than a chunk has."""

    vocabularies: tuple[int, ...]  # V, and the ids that both models share
    width: int  # D: a gradient [D, V] is of the head, not of positions
    rows: int | None  # n, at most; None: all ids are asked, of every position


class Followed(Alive):
    """Counts what lives, but for storages of the sizes in `unwritten`, and remembers the most
    positions of any tensor [n, V]."""

    def __init__(
        self, chunks: Chunks, known: Iterable[Tensor], *, unwritten: frozenset[int] = frozenset()
    ) -> None:
        known = list(known)
        super().__init__(*known)
        self.widest = 0
        self._unwritten = unwritten
        self._chunks = chunks
        self._lasting = {held(tensor).untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                self._look_at(held(tensor))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() not in self._unwritten:
            super()._see(storage)

    def _look_at(self, tensor: Tensor) -> None:
        *rows, last = tensor.shape
        if last not in self._chunks.vocabularies or rows == [self._chunks.width]:
            return
        if tensor.untyped_storage()._cdata not in self._lasting:
            self.widest = max(self.widest, tensor.numel() // last)

"""What a call allocates, seen operation by operation: for tests about memory."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def largest_tensor(call: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of the call returns, backward included."""
    with _Recorder() as recorder:
        call()
    return recorder.largest


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of bytes in storages that operations of the call made and that live at one time."""
    with _Recorder() as recorder:
        call()
    return recorder.peak


class _Recorder(TorchDispatchMode):
    """Follows every new storage until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self._seen:
                self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen.add(key)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

"""Bytes that are alive, counted operation by operation, also of tensors without numbers."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held(tensor: Tensor) -> Tensor:
    """The tensor of this process that one stands for: its part of one that is spread over several,
    whether or not a collective has filled it."""
    part = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    return getattr(part, "elem", part)  # of an AsyncCollectiveTensor


class Alive(TorchDispatchMode):
    """Bytes of the storages that came into being inside and live, and the most there were; those of
    `known` do not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes, self.most = 0, 0
        # Recomputed activations without numbers lie in reference cycles, those with numbers do not.
        self.collects = False
        self._known = {held(tensor).untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(held(tensor).untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.bytes += storage.nbytes()
        if self.collects and self.bytes > self.most:
            gc.collect()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.bytes -= size

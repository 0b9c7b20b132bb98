"""Memory of this process: what it has resident, and the tensors that it holds."""

import gc
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor

from cluster.sizing.alive import held

STATUS = Path("/proc/self/status")
POLL_S = 0.01


def resident_bytes() -> int:
    """Bytes that this process has in memory, without those it shares, as of an object store."""
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024 * (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0]))
    except (OSError, KeyError):  # not Linux
        return psutil.Process().memory_info().rss


class ResidentPeak:
    """The most that this process has resident, looked at all the time by a thread of its own."""

    def __init__(self) -> None:
        self.most = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "ResidentPeak":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self.most = max(self.most, resident_bytes())


def live_tensors(device: torch.device) -> list[Tensor]:
    """Every tensor on a device that Python can reach, gradients of weights among them."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    gradients = [one.grad for one in found if one.is_leaf and one.grad is not None]
    return [one for one in [*found, *gradients] if one.device.type == device.type]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what tensors lie in, each storage once."""
    storages = [held(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

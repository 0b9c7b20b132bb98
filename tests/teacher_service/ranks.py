"""Processes of one tensor-parallel group, without Ray: each calls what it is sent."""

import pickle
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from teacher_service.engine.tensor_parallel import join, listen, reach

HOST = "127.0.0.1"
TIMEOUT_S = 60.0


class Ranks:
    """A group of processes over gloo that lives until it is closed."""

    def __init__(self, size: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._store, port = listen(HOST)
        context, self._pipes, self.processes = get_context("spawn"), [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, port, rank, size, timeout_s), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returns, in order. Raises what the first to fail raises."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        found = [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes]
        for error in found:
            if isinstance(error, Exception):
                raise error
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(pipe: Any, port: int, rank: int, size: int, timeout_s: float) -> None:
    torch.set_num_threads(1)
    join(reach(HOST, port), rank, size, on_gpu=False, stall_s=timeout_s)
    while True:
        function, args = pickle.loads(pipe.recv_bytes())
        try:
            found = function(*args)
        except Exception as error:
            found = error
        pipe.send_bytes(pickle.dumps(found))

"""Processes that train one model together, each on its part of every step's rows.

On few cores two processes use them better than two threads, which lose their time waiting for each
other as soon as something else runs. They add up vectors in a file that both have mapped; a byte
through a pipe says that a part is written, so that nobody waits in a busy loop, and the end of one
process is the end of the other.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from shared.errors import TutelageError

SLOTS = 2  # used in turn: a slot is written again only after both have read it
EXCHANGE = "exchange.bin"


class Team:
    """One process alone: nothing is exchanged."""

    rank, size = 0, 1

    def add_up(self, vector: torch.Tensor) -> None:
        """Replace a float32 vector by the sum over the team, the same to the bit everywhere."""


class Pair(Team):
    """One of two processes."""

    size = 2

    def __init__(self, rank: int, exchange: Path, told: IO[bytes], tell: IO[bytes]) -> None:
        self.rank, self._told, self._tell, self._turn = rank, told, tell, 0
        num = exchange.stat().st_size // 4
        shared = torch.from_file(str(exchange), shared=True, size=num, dtype=torch.float32)
        self._slots = shared.view(SLOTS, self.size, -1)

    def add_up(self, vector: torch.Tensor) -> None:
        """See `Team`. Raises TutelageError where the other process has ended."""
        parts = self._slots[self._turn % SLOTS, :, : vector.numel()]
        self._turn += 1
        parts[self.rank] = vector
        try:
            self._tell.write(b".")
            self._tell.flush()
            heard = self._told.read(1)
        except BrokenPipeError:
            heard = b""
        if not heard:
            raise TutelageError(
                "the second process that trains the built-in model has ended; run the same "
                "command again, it continues from what was kept last"
            )
        torch.add(parts[0], parts[1], out=vector)


@contextmanager
def paired(module: str, arguments: Sequence[str], folder: Path, *, numbers: int) -> Iterator[Team]:
    """Rank 0, for the length of a `with`, beside a process that runs `module` with `arguments` and
    takes part as `partner`; vectors have at most `numbers` elements."""
    exchange = folder / EXCHANGE
    with exchange.open("wb") as file:
        file.truncate(4 * SLOTS * Pair.size * numbers)
    project = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": search},
        start_new_session=True,  # Ctrl-C is for rank 0, with which this one ends
    )
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    try:
        yield Pair(0, exchange, process.stdout, process.stdin)
    finally:
        process.kill()
        process.communicate()
        exchange.unlink(missing_ok=True)


def partner(folder: Path) -> Team:
    """Rank 1, in the process that `paired` started. What is printed goes to stderr."""
    tell = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Pair(1, folder / EXCHANGE, sys.stdin.buffer, tell)

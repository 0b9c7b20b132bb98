"""A job's log as it is written, to its end, whatever becomes of the connection meanwhile."""

import asyncio
import importlib
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.submission.dashboard import Dashboard
from shared.errors import PlacementError

RECONNECT_S = 2.0
UNREACHABLE_S = 120.0  # until a dashboard that is gone is given up


def follow(dashboard: Dashboard, job: str) -> Any:
    """Print what a job says until it ends, and return it as Ray describes it. Raises
    PlacementError where the dashboard is gone for long; the job may go on."""
    aiohttp: Any = importlib.import_module("aiohttp")  # one of Ray's dependencies
    log = _Log(dashboard, job)
    reached = time.monotonic()
    while True:
        with suppress(aiohttp.ClientError, RuntimeError, OSError):  # the connection is lost
            asyncio.run(log.print_more())
        try:
            found = dashboard.job(job)
            if found.status.is_terminal():
                log.print_rest()
                return found
            reached = time.monotonic()
        except PlacementError:
            if time.monotonic() - reached > UNREACHABLE_S:
                raise
        time.sleep(RECONNECT_S)


@dataclass(slots=True)
class _Log:
    """What a job says, of which some is printed."""

    dashboard: Dashboard
    job: str
    printed: int = 0  # characters

    async def print_more(self) -> None:
        """Print what is not printed yet, until the connection or the job ends."""
        seen = 0  # the log comes from its start again
        async for text in self.dashboard.client.tail_job_logs(self.job):
            self._print(text[max(0, self.printed - seen) :])
            seen += len(text)

    def print_rest(self) -> None:
        """Print what a log that has ended has more."""
        self._print(self.dashboard.log(self.job)[self.printed :])

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self.printed += len(text)

"""Groups of ranks that stay for the whole session, so that each imports torch and DeepSpeed once.

Two processes of `torch.distributed.run` and their imports cost more than most of the jobs they do.
The launcher itself is tested in `test_torchrun.py`.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.forking import python
from tests.student_trainer.runs import ROOT

POLL_S = 0.05


def run_jobs(
    jobs: Sequence[dict], folder: Path, *, ranks: int = 2, timeout_s: float = 580
) -> list[dict]:
    """Run jobs one after the other in a group of processes; returns rank 0's results.

    The group is that of the calls before. A job that raises ends it, and the next call has another.
    The folder is there for this call alone: in one with results the wait would be over at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not (folder / "results.json").exists(), f"{folder} holds results of other jobs"
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    try:
        _group(ranks).run(folder, timeout_s)
    except BaseException:
        _group(ranks).close()
        _group.cache_clear()
        raise
    return json.loads((folder / "results.json").read_text())


class _Group:
    """Processes that take the names of folders with jobs, and end with what they read from."""

    def __init__(self, ranks: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes = [self._start(rank, ranks) for rank in range(ranks)]

    def _start(self, rank: int, ranks: int) -> subprocess.Popen:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {name: str(value) for name, value in place.items()}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        meeting = f"file://{self._folder}/rendezvous"
        with self._said(rank).open("w") as said:
            return subprocess.Popen(
                [*python("ranks"), "-m", "tests.student_trainer.processes", meeting],
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _said(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def run(self, folder: Path, timeout_s: float) -> None:
        """Let all ranks do the jobs of a folder, and wait until they have."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            assert process.stdin is not None
            print(folder, file=process.stdin, flush=True)
        left = set(range(len(self._processes)))
        while left:
            left = {rank for rank in left if not (folder / f"done-{rank}").exists()}
            ended = [rank for rank in left if self._processes[rank].poll() is not None]
            assert not ended, self._said(ended[0]).read_text()[-9000:]
            assert time.monotonic() < deadline, [self._said(rank).read_text() for rank in left]
            time.sleep(POLL_S)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.terminate()
            process.wait()


@cache
def _group(ranks: int) -> _Group:
    return _Group(ranks)

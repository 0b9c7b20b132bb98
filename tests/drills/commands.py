"""`tutelage` commands in processes of their own, in the home of a user who has nothing else."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from shared.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
POLL_S = 0.02
NOT_OURS = re.compile(  # tracebacks, and what Ray says of its own accord
    r"Traceback|\*\*\* SIG|core dumped|a fault of|Exception|raylet|^\[20\d\d-|^[EWF]\d{4} ", re.M
)


class Command:
    """A command at work, its output in a file; a session of its own, as from a terminal."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: dict[str, str],
        log: Path,
        folder: Path = ROOT,
    ) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                arguments,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Everything said so far."""
        return self.log.read_text()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(patience_s)

    def family(self) -> list[psutil.Process]:
        """Itself and every process below it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL to the command alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_everything(self) -> None:
        """SIGKILL to the command and all below it, at once."""
        family = self.family()
        for member in family:
            member.suspend()  # none may repair the death of another
        for member in family:
            member.kill()
        self.process.wait()


class Home:
    """A user's home folder, Ray's temporary files included, and whatever runs from it. Commands are
    called in `working`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.working = ROOT
        self._number = 0

    @property
    def environment(self) -> dict[str, str]:
        """This process's variables without those that lead to other clusters."""
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "XDG_"))}
        return kept | {
            "HOME": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self, *arguments: str, **variables: str) -> Command:
        """A `tutelage` command, not waited for."""
        return self.execute(sys.executable, "-m", "cluster", *arguments, **variables)

    def run(self, *arguments: str, expecting: int = 0, **variables: str) -> str:
        """A `tutelage` command to its end; returns what it said."""
        return self._end(self.start(*arguments, **variables), expecting)

    def ray(self, *arguments: str, **variables: str) -> Command:
        """A command of Ray's own, not waited for."""
        return self.execute(sys.executable, "-m", "ray.scripts.scripts", *arguments, **variables)

    def execute(self, *arguments: str, **variables: str) -> Command:
        """Any command, not waited for."""
        self._number += 1
        log = self.folder / f"command-{self._number}.log"
        environment = self.environment | variables
        return Command(arguments, environment=environment, log=log, folder=self.working)

    def processes(self) -> list[psutil.Process]:
        """Every process that lives in this home, whoever its parent is."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def clear(self) -> None:
        """Kill whatever is left."""
        left = self.processes()
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)

    def _end(self, command: Command, expecting: int) -> str:
        code = command.wait()
        assert code == expecting, f"exit code {code}\n{command.output}"
        assert "Traceback" not in command.output, command.output
        return command.output

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            lives = process.status() != psutil.STATUS_ZOMBIE
            return lives and process.environ().get("HOME") == str(self.folder)
        except psutil.Error:
            return False


def titled(processes: Sequence[psutil.Process], *titles: str) -> list[psutil.Process]:
    """The processes of Ray actors whose title names one of these."""
    found = []
    for process in processes:
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if line.startswith("ray::") and any(title in line for title in titles):
            found.append(process)
    return found


def wait_until(
    condition: Callable[[], bool], *, doing: Command | None = None, patience_s: float = PATIENCE_S
) -> None:
    """Wait for a condition while a command runs; fails where the command ends first."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert doing is None or doing.running, doing.output
        assert time.monotonic() < deadline, doing.output if doing else "not in time"
        time.sleep(POLL_S)


def heard(command: Command) -> bool:
    """Whether a command answers signals: SIGTERM is blocked, so that one thread hears it."""
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.M)
    return blocked is not None and bool(int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1)


def steps_done(run: Path) -> int:
    """The last step of a run that has a line."""
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1].step if lines else 0


def reached(run: Path, step: int) -> Callable[[], bool]:
    """A condition: the run has done so many steps."""
    return lambda: steps_done(run) >= step

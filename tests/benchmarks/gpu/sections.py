"""Sections of measurements, each with a time of its own, written down as soon as they are made.

A case that fails is recorded with its error, one that takes too long is interrupted, and what a
section has no time left for is named as left out, so that no case can lose another's numbers.
"""

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Numbers = Mapping[str, Any]  # what JSON takes
Case = Callable[[], Numbers]


@dataclass(frozen=True)
class Section:
    """Cases that are made when their turn comes, in order, within `seconds` altogether."""

    name: str
    seconds: float
    cases: Callable[[], Mapping[str, Case]]


class OutOfTime(BaseException):
    """A case took what was left of its section's time."""


@dataclass
class Record:
    """The JSON file, whole after every case."""

    path: Path
    found: dict[str, Any]

    def write(self, section: str, case: str, numbers: Numbers) -> None:
        """Add what a case found."""
        self.found.setdefault(section, {})[case] = dict(numbers)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.found, indent=1) + "\n")
        scratch.replace(self.path)
        print(f"{section} / {case}: {json.dumps(dict(numbers))}", flush=True)


def measure(section: Section, record: Record) -> None:
    """Run a section's cases. Nothing they raise gets out, but for Ctrl-C."""
    ends = time.monotonic() + section.seconds
    try:
        with at_most(section.seconds):
            cases = section.cases()
    except (Exception, OutOfTime) as error:
        record.write(section.name, "set-up", failure(error))
        return
    for name, case in cases.items():
        left = ends - time.monotonic()
        if left <= 0:
            record.write(section.name, name, {"left_out": "no time is left for it"})
            continue
        began = time.monotonic()
        try:
            with at_most(left):
                numbers = {**case(), "wall_s": time.monotonic() - began}
        except (Exception, OutOfTime) as error:
            numbers = failure(error)
        record.write(section.name, name, numbers)
        release()


def failure(error: BaseException) -> Numbers:
    """An error as the record has it."""
    return {"failed": f"{type(error).__name__}: {error}"[:500]}


def release() -> None:
    """Give back what the last case held of a GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so long, between two calls that Python makes."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def conforms(errors: Mapping[str, float], *, bar: float) -> Numbers:
    """Errors against float64 and the verdict; one that is no number does not conform."""
    return {
        "errors": dict(errors),
        "bar": bar,
        "conforms": all(error <= bar for error in errors.values()),
    }


def timed(
    call: Callable[[], object],
    device: torch.device,
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> Numbers:
    """Median seconds of a call after a first one, and the peak of what tensors hold above before,
    None on a CPU. `before` is called before each and not timed."""
    before()
    call()
    before()
    held = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times_s = []
    for _ in range(rounds):
        before()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    peak = None if held is None else torch.cuda.max_memory_allocated() - held
    return {"seconds": sorted(times_s)[rounds // 2], "peak_bytes": peak}

"""The controller's vocabulary: reports, weight entries, and the log that decides every draw.

D domains in config order
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shared.errors import CheckpointError

_TAIL_BYTES = 4096  # looked through at a time for the end of the last whole line


@dataclass(frozen=True, slots=True)
class DomainReport:
    """Sums of all ranks at a decision step, one entry per domain in config order.

    Of validation text, where the policy needs it, and of the training text since the report before.
    """

    step: int
    student_nll_sums: tuple[float, ...] = ()  # nats, validation
    num_tokens: tuple[int, ...] = ()  # validation
    teacher_nlls: tuple[float, ...] = ()  # nats per validation token, constant over the run
    training_tokens: tuple[int, ...] = ()
    training_kl_sums: tuple[float, ...] = ()  # nats, KL(teacher || student)
    training_excess_sums: tuple[float, ...] = ()  # nats, student's NLL above the teacher's, >= 0


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """Domain weights, as shares of loss tokens, that rule from a block on until the next entry."""

    index: int
    decided_at: int  # step
    effective_from: int  # block; a block is one optimiser step's rows
    weights: tuple[float, ...]  # config order, sum 1
    factors: tuple[float, ...] | None = None  # what the policy remembers
    phase: int = 0  # of progressive distillation
    gap: float | None = None  # student's NLL above the teacher's at decided_at, nats per token,
    # mean over domains; None where no validation text was looked at
    stop: bool = False  # training ends where it takes effect


@dataclass(frozen=True, slots=True)
class WeightLog:
    """All entries so far, ascending in `effective_from`; append only."""

    domains: tuple[str, ...]
    entries: tuple[WeightEntry, ...]

    def appended(self, entry: WeightEntry) -> "WeightLog":
        """The log with one entry more, which must follow the last."""
        assert entry.index == len(self.entries), "entries are appended in order"
        return WeightLog(self.domains, (*self.entries, entry))

    def end(self, steps: int) -> int:
        """Steps of a run of at most `steps`. The step under way at a decision is still taken."""
        stops = [max(e.effective_from, e.decided_at + 1) for e in self.entries if e.stop]
        return min([steps, *stops])

    def ruling(self, block: int) -> WeightEntry:
        """The entry whose weights a block is drawn with."""
        return next(e for e in reversed(self.entries) if e.effective_from <= block)

    def mean_weights(self, blocks: range) -> tuple[float, ...]:
        """Mean over blocks, of which there is at least one, of the weights each is drawn with."""
        drawn = Counter(self.ruling(block).index for block in blocks)
        mean_D = [0.0] * len(self.domains)
        for index, count in drawn.items():
            weights = self.entries[index].weights
            mean_D = [m + count / len(blocks) * w for m, w in zip(mean_D, weights, strict=True)]
        return tuple(mean_D)


class ControllerClient(Protocol):
    """What rank 0 of the trainer needs of the controller."""

    def observe(self, report: DomainReport) -> None:
        """Hand a report over and return at once. The same step twice changes nothing.

        Whether it arrived, and what is wrong with it, shows in the next `entry`.
        """
        ...

    def entry(self, index: int) -> WeightEntry:
        """Entry `index` of the log, waited for up to the controller's deadline.

        Every report handed over before is recorded first; raises TutelageErrors about those too.
        """
        ...

    def peek(self, index: int) -> WeightEntry | None:
        """Entry `index` where it is known by now; never waits and raises nothing of its own."""
        ...


def write_entry(path: Path, domains: Iterable[str], entry: WeightEntry) -> None:
    """Append one line to `weight_log.jsonl`, in place of a torn one, and flush it to disk."""
    names = tuple(domains)
    line = asdict(entry)
    for field in ("weights", "factors"):
        if line[field] is not None:
            line[field] = dict(zip(names, line[field], strict=True))
    with path.open("ab+") as file:
        file.truncate(_end_of_lines(file))
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_of_lines(file: BinaryIO) -> int:
    """Offset after the last whole line, looked for from the end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_log(path: Path, domains: Iterable[str]) -> WeightLog:
    """The log of a run; an absent file is an empty log, a torn last line is dropped."""
    log = WeightLog(tuple(domains), ())
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _entry(json.loads(line), log.domains, index=number - 1)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, line {number}, is no weight entry for {', '.join(log.domains)} "
                f"({type(error).__name__}: {error}); put the file back or start with --fresh"
            ) from error
        log = log.appended(entry)
    return log


def _entry(fields: Any, domains: tuple[str, ...], *, index: int) -> WeightEntry:
    if not isinstance(fields, dict) or fields["index"] != index:
        raise ValueError(f"entry {index} is due")
    for field in ("weights", "factors"):
        if fields.get(field) is not None:
            by_name = fields[field]
            fields[field] = tuple(by_name[name] for name in domains)
    return WeightEntry(**fields)

"""The controller's vocabulary: reports, weight entries, and the log that decides every draw."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DomainReport:
    """Validation sums of all ranks at a decision step, one entry per domain in config order."""

    step: int
    student_nll_sums: tuple[float, ...]  # nats
    num_tokens: tuple[int, ...]
    teacher_nlls: tuple[float, ...]  # nats per token, constant over the run


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """Domain weights, as shares of loss tokens, that rule from a block on until the next entry."""

    index: int
    decided_at: int  # step
    effective_from: int  # block; a block is one optimiser step's rows
    weights: tuple[float, ...]  # config order, sum 1


@dataclass(frozen=True, slots=True)
class WeightLog:
    """All entries so far, ascending in `effective_from`; append only."""

    domains: tuple[str, ...]
    entries: tuple[WeightEntry, ...]

    def appended(self, entry: WeightEntry) -> "WeightLog":
        """The log with one entry more, which must follow the last."""
        assert entry.index == len(self.entries), "entries are appended in order"
        return WeightLog(self.domains, (*self.entries, entry))

    def ruling(self, block: int) -> WeightEntry:
        """The entry whose weights a block is drawn with."""
        return next(e for e in reversed(self.entries) if e.effective_from <= block)


class ControllerClient(Protocol):
    """What rank 0 of the trainer needs of the controller."""

    def observe(self, report: DomainReport) -> None:
        """Hand a report over; returns when it is recorded. The same step twice changes nothing."""
        ...

    def entry(self, index: int) -> WeightEntry:
        """Entry `index` of the log, waited for up to the controller's deadline."""
        ...


def write_entry(path: Path, domains: Iterable[str], entry: WeightEntry) -> None:
    """Append one line to `weight_log.jsonl` and flush it to disk."""
    line = asdict(entry) | {"weights": dict(zip(domains, entry.weights, strict=True))}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path, domains: Iterable[str]) -> WeightLog:
    """The log of a run; an absent file is an empty log, a torn last line is dropped."""
    names = tuple(domains)
    log = WeightLog(names, ())
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            break
        fields["weights"] = tuple(fields["weights"][name] for name in names)
        log = log.appended(WeightEntry(**fields))
    return log

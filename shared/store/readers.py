"""Readers of a target store: with no teacher alive, or beside one that answers what is missing."""

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from shared.data.rows import Rows
from shared.store.target_store import TargetStore, stored_teacher
from shared.targets.asks.ask import IdsEncoding
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets


class StoreReader:
    """A `TargetReader` with no teacher alive; a row that is not stored stops the run, and so does
    a damaged file.

    `teacher` None takes the one whose answers are stored.
    """

    def __init__(self, store: str | Path, *, teacher: Mapping[str, str] | None = None) -> None:
        self._stores = _Stores(store, teacher)
        self._asked: deque[tuple[Rows, Question]] = deque()
        self._stats = ReaderStats()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made."""
        return self._stats

    def submit(self, rows: Rows, question: Question) -> None:
        """Ask for a unit."""
        self._asked.append((rows, question))

    def next(self) -> SoftTargets:
        """The oldest unit asked for. Raises TeacherError naming rows that are not stored, and
        DamagedError."""
        started = time.monotonic()
        rows, question = self._asked[0]
        targets = self._stores.of(question).read(rows)
        self._asked.popleft()
        _count(self._stats, targets, hit=True, wait_s=time.monotonic() - started)
        return targets

    def close(self) -> None:
        """Drop what was asked for and let go of the store."""
        self._asked.clear()
        self._stores.close()


class RecordingReader:
    """Reads through a store: what it holds comes from disk, the rest from `reader`, committed
    before it is delivered, its ids as `ids` says; None: as they came.

    A unit with one missing row is scored whole, so that what is scored together depends on no
    cache; of a row that was stored, the stored answer is delivered all the same. A damaged file is
    set aside and its rows are asked again. Answers to the question `unkept` are read where they are
    stored, and never added.
    """

    def __init__(
        self,
        reader: TargetReader,
        store: str | Path,
        *,
        teacher: Mapping[str, str],
        ids: IdsEncoding | None = None,
        unkept: Question | None = None,
    ) -> None:
        self._reader, self._unkept = reader, unkept
        self._stores = _Stores(store, teacher, ids, sets_aside=True)
        self._asked: deque[tuple[Rows, Question, SoftTargets | None]] = deque()
        self._stats = ReaderStats()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made; a hit is a unit read whole from the store."""
        self._stats.retried_units = self._reader.stats.retried_units
        return self._stats

    def submit(self, rows: Rows, question: Question) -> None:
        """Ask for a unit; it is read at once where the store has it."""
        started = time.monotonic()
        stored = self._stores.of(question).find(rows)
        self._stats.wait_s += time.monotonic() - started
        self._asked.append((rows, question, stored))
        if stored is None:
            self._reader.submit(rows, question)

    def next(self) -> SoftTargets:
        """The oldest answer, from disk or from the inner reader."""
        started = time.monotonic()
        rows, question, stored = self._asked[0]
        if stored is None:
            targets = self._reader.next()
            if question != self._unkept:
                targets = self._stores.of(question).kept(rows, targets)
        else:
            targets = stored
        self._asked.popleft()
        hit = stored is not None
        _count(self._stats, targets, hit=hit, wait_s=time.monotonic() - started)
        return targets

    def close(self) -> None:
        """Close the files and the inner reader."""
        self._asked.clear()
        self._stores.close()
        self._reader.close()


class _Stores:
    """The store's folder of each question, opened when it is first asked."""

    def __init__(
        self,
        store: str | Path,
        teacher: Mapping[str, str] | None,
        ids: IdsEncoding | None = None,
        *,
        sets_aside: bool = False,
    ) -> None:
        self._store, self._teacher, self._sets_aside = store, teacher, sets_aside
        self._ids: IdsEncoding | None = ids
        self._open: dict[Question, TargetStore] = {}

    def of(self, question: Question) -> TargetStore:
        if question not in self._open:
            self._open[question] = TargetStore(
                self._store,
                teacher=self._teacher or stored_teacher(self._store, question),
                question=question,
                ids=self._ids,
                sets_aside=self._sets_aside,
            )
        return self._open[question]

    def close(self) -> None:
        for store in self._open.values():
            store.close()
        self._open.clear()


def _count(stats: ReaderStats, targets: SoftTargets, *, hit: bool, wait_s: float) -> None:
    stats.units += 1
    stats.cache_hits += hit
    stats.wire_bytes += targets.num_bytes
    stats.wait_s += wait_s

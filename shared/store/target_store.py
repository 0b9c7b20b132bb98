"""SoftTargets on disk: the same Tables that travel, kept by row, their ids written as asked.

A store is a folder with one folder per teacher and question, named by their digest;
`description.json` says what they are. Every answer is committed as a file of its own before it is
delivered; a writer puts its small files together as they grow many. Files are never changed, so
any number of processes write and read at once. The index is built from the files' footers.
"""

import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.data.rows import Rows
from shared.errors import ConfigError, DamagedError, StorageError, TeacherError
from shared.locations import Location
from shared.store.answer_files import (
    FILE_BYTES,
    SUFFIX,
    AnswerFile,
    CommittedBatch,
    Holding,
    RowPlace,
    damage,
    described_as,
    open_file,
    open_reader,
    question_key,
    rewritten,
    write_file,
)
from shared.store.leases import Lease
from shared.targets.asks.ask import IdsEncoding
from shared.targets.question import Question
from shared.targets.soft_targets import METADATA_KEY, SoftTargets

DESCRIPTION = "description.json"
SET_ASIDE = ".damaged"
MANY_FILES = 64  # of one writer, before it puts them together
REFRESH_S = 10.0  # at most this often a store looks for what other processes have written
OPEN_FILES = 32
THREADS = 16  # that read footers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """One folder of a store."""

    place: Location
    teacher: dict[str, str]  # the engine's fingerprint
    question: Question

    @property
    def key(self) -> str:
        """The folder's name."""
        return self.place.path.rpartition("/")[2]

    def is_of(self, named: Mapping[str, str]) -> bool:
        """Whether the teacher has these fields, models by the last part of their names."""
        return _fields(self.teacher, named) == dict(named)


def stored_answers(store: str | Path) -> list[StoredAnswers]:
    """What a store holds, so that a run without a teacher can learn whose answers they are.
    Folders of other versions are passed over."""
    place = Location.of(store)
    found = [_described(place / info.base_name) for info in place.list() if not info.is_file]
    return [answers for answers in found if answers is not None]


def stored_teacher(
    store: str | Path, question: Question, *, named: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Fingerprint of the one teacher whose answers to a question are stored. `named`: fields that
    it must have, models by the last part of their names. Raises ConfigError."""
    named = named or {}
    answers = stored_answers(store)
    matching = [a for a in answers if a.question == question]
    if not matching:
        held = "; ".join(a.question.in_words() for a in answers)
        raise ConfigError(
            f"targets.store {store} holds {held or 'nothing'}, asked is {question.in_words()}; "
            "`tutelage capture CONFIG` fills it, or change targets"
        )
    held = " and ".join(_in_words(a.teacher, named) for a in matching)
    matching = [answers for answers in matching if answers.is_of(named)]
    if not matching:
        raise ConfigError(
            f"targets.store {store} has answers of {held}, but teachers names "
            f"{_in_words(named, named)}; name that teacher, or fill another store with "
            "`tutelage capture CONFIG`"
        )
    if len(matching) > 1:
        raise ConfigError(
            f"targets.store {store} has answers of {len(matching)} teachers to the same question; "
            f"keep one of {', '.join(a.key for a in matching)}: `tutelage cache gc {store} "
            "--question NAME` removes one"
        )
    return matching[0].teacher


def _fields(teacher: Mapping[str, str], named: Mapping[str, str]) -> dict[str, str]:
    """Those of a fingerprint that are named, models and adapters by the last part of theirs."""
    return {name: teacher.get(name, "").rstrip("/").rpartition("/")[2] for name in named}


def _in_words(teacher: Mapping[str, str], named: Mapping[str, str]) -> str:
    """What is named of a teacher, as a message lists it."""
    fields = _fields(teacher, named or {"model": ""})
    return " ".join(value for value in fields.values() if value and value != "none") or "a teacher"


class TargetStore:
    """The stored answers of one teacher to one question, by the hash of their rows.

    New ones are written with their ids as `ids` says; None: as they came. A damaged file is never
    read from: it stops the reader with a DamagedError, or with `sets_aside`, where a teacher can
    answer again, it is renamed, with a warning, and its rows count as missing.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        teacher: Mapping[str, str],
        question: Question,
        ids: IdsEncoding | None = None,
        sets_aside: bool = False,
    ) -> None:
        self._described = described_as(teacher, question)
        self._ids: IdsEncoding | None = ids
        self._sets_aside = sets_aside
        self._store = Location.of(store)
        self._key = question_key(teacher, question)
        self._folder = self._store / self._key
        self._lease = Lease(self._folder)
        self._files: dict[str, AnswerFile] = {}
        self._own: list[AnswerFile] = []  # written here and not put together yet
        self._index: dict[bytes, RowPlace] = {}
        self._readers: OrderedDict[str, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._refused: set[str] = set()  # damaged files
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def holding(self) -> Holding:
        """What is stored, as far as this reader knows."""
        return Holding.of(self._files.values())

    def refresh(self, *, again: int = 3) -> None:
        """Take in what other processes have written, looking again where files vanish."""
        self._looked_at = time.monotonic()
        infos = {i.base_name: i for i in self._folder.list() if i.base_name.endswith(SUFFIX)}
        if infos and self._lease.set():
            self._used()
        self._forget(set(self._files) - set(infos))
        new = [name for name in infos if name not in self._files and name not in self._refused]
        with ThreadPoolExecutor(THREADS) as pool:
            opened = list(pool.map(self._opened, new, [infos[name].size for name in new]))
        self._remember(*filter(None, opened))
        if again and any(name not in self._files and name not in self._refused for name in new):
            self.refresh(again=again - 1)  # their writer has put them together meanwhile

    def missing(self, rows: Rows) -> list[str]:
        """Names of the rows that are not stored, each once."""
        pairs = list(zip(rows.hashes(), rows.names(), strict=True))
        if any(key not in self._index for key, _ in pairs) and self._is_stale():
            self.refresh()
        return list(dict.fromkeys(name for key, name in pairs if key not in self._index))

    def find(self, rows: Rows) -> SoftTargets | None:
        """The unit of these rows as `read` gives it, None where one is not stored."""
        while len(rows) and not self.missing(rows):
            with suppress(_Gone):
                return self._assembled(rows.hashes())
        return None

    def read(self, rows: Rows) -> SoftTargets:
        """The unit of these rows, bit for bit as it was written; where its rows have their ids
        written in two ways, as its first row. Raises TeacherError, naming the first rows that are
        not stored, and DamagedError."""
        if (found := self.find(rows)) is not None:
            return found
        if not len(rows):
            return self._empty()
        missing = self.missing(rows)
        raise TeacherError(
            f"targets.store {self._store.shown} lacks {len(missing)} of "
            f"{len(set(rows.names()))} rows, first {', '.join(missing[:3])}; "
            "`tutelage capture CONFIG` fills it"
        )

    def write(self, targets: SoftTargets) -> None:
        """Commit the rows that are not stored yet. Raises StorageError; what was stored stays."""
        keys = targets.table.column("row_hash").to_pylist()
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        new = sorted(row for key, row in first.items() if key not in self._index)
        if not new:
            return
        chosen = SoftTargets(targets.table.take(new))
        if self._ids is not None:
            chosen = chosen.with_ids(self._ids)
        self._describe()
        batch = chosen.table.combine_chunks().to_batches()[0]
        file = write_file(self._folder, [CommittedBatch(batch, time.time_ns())])
        self._own.append(file)
        self._remember(file)
        if len(self._own) >= MANY_FILES or sum(f.size for f in self._own) >= FILE_BYTES:
            self._put_together()

    def kept(self, rows: Rows, answer: SoftTargets) -> SoftTargets:
        """Commit an answer to these rows; returns what must be delivered: the bytes that are
        stored of each row, which are older where it was stored before."""
        new = set(rows.hashes()) - set(self._index)
        self.write(answer)
        if len(new) == len(rows):
            return answer
        while (found := self.find(rows)) is None:
            self.write(answer)  # a file was set aside meanwhile
        return found

    def close(self) -> None:
        """Put together what was written, and let go of the folder."""
        self._put_together()
        self._readers.clear()
        self._lease.clear()

    def _assembled(self, keys: Sequence[bytes]) -> SoftTargets:
        entries = [self._index[key] for key in keys]
        records = {at: self._batch(*at) for at in dict.fromkeys(entry[:2] for entry in entries)}
        parts = [records[name, batch].slice(row, 1) for name, batch, row in entries]
        found = [SoftTargets(pa.Table.from_batches([part])) for part in parts]
        if len({tuple(part.schema.types) for part in parts}) > 1:
            ids = found[0].ids
            found = [targets.with_ids(ids) for targets in found]
        return SoftTargets(pa.concat_tables([each.table for each in found]).combine_chunks())

    def _batch(self, name: str, number: int) -> pa.RecordBatch:
        """A checked batch. Raises _Gone where its file has left the index instead."""
        file = self._files[name]
        try:
            if name not in self._readers:
                self._readers[name] = open_reader(file.place)
            self._readers.move_to_end(name)
            if len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)
            return file.batch(number, self._readers[name])
        except FileNotFoundError:  # put together by its writer, or removed
            self._forget([name])
            self.refresh()
        except DamagedError as error:
            self._forget([name])
            self._handle(file.place, error)
        raise _Gone

    def _opened(self, name: str, size: int) -> AnswerFile | None:
        place = self._folder / name
        try:
            return open_file(place, size=size, question=self._key)
        except FileNotFoundError:
            return None  # its writer has just put it together with others
        except DamagedError as error:
            self._handle(place, error)
            return None

    def _handle(self, place: Location, error: DamagedError) -> None:
        if not self._sets_aside:
            raise DamagedError(
                f"{error}; `tutelage cache verify {self._store.shown} --delete` removes it, then "
                "`tutelage capture CONFIG` asks for its rows again"
            ) from error
        name = place.path.rpartition("/")[2]
        self._refused.add(name)
        with suppress(StorageError):
            place.rename(name + SET_ASIDE)
        log.warning("%s; it is set aside, and the teacher is asked for its rows again", error)

    def _put_together(self) -> None:
        """Larger files in the place of this writer's own; where the disk is too full, they stay."""
        small, self._own = self._own, []
        if len(small) < 2:
            return
        with suppress(StorageError, DamagedError, FileNotFoundError):
            larger = rewritten(self._folder, small)
            self._forget([file.name for file in small])
            self._remember(*larger)
            for file in small:
                file.place.delete()

    def _describe(self) -> None:
        self._lease.set()
        place = self._folder / DESCRIPTION
        text = json.dumps(self._described, indent=1, sort_keys=True).encode()
        if not self._files and not self._own:
            place.write(text)

    def _used(self) -> None:
        """Date the folder's last use, where it lies on this machine."""
        if self._folder.local is not None:
            with suppress(OSError):
                os.utime(self._folder.local / DESCRIPTION)

    def _remember(self, *files: AnswerFile) -> None:
        """Add to the index; of several copies of a row, the one known first stays, then the one
        committed first."""
        self._files |= {file.name: file for file in files}
        batches = [(batch, f.name, n) for f in files for n, batch in enumerate(f.facts)]
        for batch, name, number in sorted(batches, key=lambda entry: entry[0].written_at):
            for row, key in enumerate(batch.keys):
                self._index.setdefault(key, (name, number, row))

    def _forget(self, names: Iterable[str]) -> None:
        """Take files out of the index; copies of their rows in other files take their place."""
        gone = {name for name in names if self._files.pop(name, None) is not None}
        if not gone:
            return
        for name in gone:
            self._readers.pop(name, None)
        self._index = {key: entry for key, entry in self._index.items() if entry[0] not in gone}
        self._remember(*self._files.values())

    def _is_stale(self) -> bool:
        return time.monotonic() - self._looked_at > REFRESH_S

    def _empty(self) -> SoftTargets:
        for name in self._files:
            return SoftTargets(open_reader(self._files[name].place).schema.empty_table())
        raise TeacherError(f"targets.store {self._store.shown} is empty; fill it first")


class _Gone(Exception):
    """A file has left the index while it was asked; look again."""


def _described(folder: Location) -> StoredAnswers | None:
    """Whose answers to what a folder holds, None where it is of another version or of something
    else. A description that is damaged or missing is read from the answers themselves."""
    key = folder.path.rpartition("/")[2]
    for found in _descriptions(folder):
        with suppress(TypeError, KeyError, ValueError):
            teacher, question = found["teacher"], Question.from_dict(found["spec"])
            if question_key(teacher, question) == key:
                return StoredAnswers(folder, teacher, question)
    return None


def _descriptions(folder: Location) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError, ValueError):
        yield json.loads((folder / DESCRIPTION).read())
    for info in folder.list():
        if info.base_name.endswith(SUFFIX):
            with suppress(FileNotFoundError, DamagedError), damage(folder / info.base_name):
                schema = open_reader(folder / info.base_name).schema
                yield json.loads((schema.metadata or {})[METADATA_KEY])

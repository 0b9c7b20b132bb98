"""Upkeep of a target store: what it holds, what is damaged, and what may go.

Nothing that a live process uses is removed. On this machine's file systems their marks tell; on
others nobody can, so what was written within a day is left alone there.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from pyarrow import fs as file_systems

from shared.errors import ConfigError, DamagedError
from shared.locations import UNFINISHED, Location
from shared.store import leases
from shared.store.answer_files import (
    FILE_BYTES,
    SUFFIX,
    AnswerFile,
    Holding,
    RowPlace,
    check_bytes,
    check_file,
    open_file,
    rewritten,
)
from shared.store.target_store import SET_ASIDE, StoredAnswers, stored_answers

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Question:
    """A folder of a store: the answers of one teacher to one question."""

    place: Location
    answers: StoredAnswers | None  # None: of another version
    files: tuple[AnswerFile, ...]  # with a sound footer
    num_damaged: int  # files without, or set aside
    size: int  # bytes of everything in the folder
    used_at: float  # seconds since 1970: opened last on this machine, or written to last

    @property
    def key(self) -> str:
        """The folder's name."""
        return self.place.path.rpartition("/")[2]

    @property
    def holding(self) -> Holding:
        """Rows, tokens and bytes of the sound files."""
        return Holding.of(self.files)

    @property
    def title(self) -> str:
        """Teacher and question, in words."""
        if self.answers is None:
            return "answers of another version of Tutelage"
        model = self.answers.teacher.get("model", "unnamed").rstrip("/").rpartition("/")[2]
        return f"{model}: {self.answers.question.in_words()}"


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what was written."""

    place: Location
    reason: str


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that clearing up removes, or with a dry run would remove."""

    what: str
    size: int  # bytes that become free


@dataclass(frozen=True, slots=True)
class Choice:
    """Which questions are removed whole: those that every part which is set applies to."""

    older_than_s: float | None = None  # since the last use
    teacher: str | None = None  # part of the name of its model
    question: str | None = None  # beginning of the folder's name

    def __bool__(self) -> bool:
        return (self.older_than_s, self.teacher, self.question) != (None, None, None)

    def holds(self, question: Question) -> bool:
        """Whether a question is chosen."""
        teacher = question.answers.teacher.get("model", "") if question.answers else ""
        age_s = time.time() - question.used_at
        return bool(self) and not (
            (self.older_than_s is not None and age_s < self.older_than_s)
            or (self.teacher is not None and self.teacher not in teacher)
            or (self.question is not None and not question.key.startswith(self.question))
        )


def questions(store: Location) -> list[Question]:
    """What a store holds, the one used last first."""
    known = {answers.key: answers for answers in stored_answers(store.shown)}
    folders = [store / info.base_name for info in store.list() if not info.is_file]
    found = [_question(f, known.get(f.path.rpartition("/")[2])) for f in folders]
    return sorted(filter(None, found), key=lambda question: -question.used_at)


def verify(store: Location, *, done: Callable[[int], object] = lambda _: None) -> Iterator[Damage]:
    """Every damaged file, found by reading all of them; `done` is told the bytes read."""
    for question in questions(store):
        for info in question.place.list():
            place = question.place / info.base_name
            if info.base_name.endswith(SET_ASIDE):
                yield Damage(place, "set aside by a run that found it damaged")
            elif info.base_name.endswith(SUFFIX):
                with suppress(FileNotFoundError):
                    try:
                        if question.answers is None:  # of another version, or all damaged
                            check_bytes(place)
                        else:
                            check_file(place, question=question.key)
                    except DamagedError as error:
                        yield Damage(place, str(error).removeprefix(f"{place.shown} is "))
            done(info.size)


def clear_up(
    store: Location,
    *,
    choice: Choice | None = None,
    keep_free: int | None = None,
    dry_run: bool = False,
) -> Iterator[Removal]:
    """Remove chosen questions, then those used longest ago until the disk has `keep_free` bytes
    free, then what crashed writers left, damaged files and second copies of a row.

    Raises ConfigError for `keep_free` where the disk's room is not known.
    """
    choice = choice or Choice()
    if keep_free is not None and store.local is None:
        raise ConfigError(
            f"{store.shown} is on no disk of this machine, whose free space could be looked at; "
            "leave --keep-free out and choose by --older-than or --teacher"
        )
    gained = 0
    for question in reversed(questions(store)):
        free = 0 if store.local is None else shutil.disk_usage(_existing(store)).free
        short = keep_free is not None and free + (gained if dry_run else 0) < keep_free
        with leases.unused(question.place) as unused:
            busy = not unused or (store.local is None and _age_s(question.used_at) < DAY_S)
            if choice.holds(question) or short:
                if busy:
                    yield Removal(f"left alone, in use: {question.key} {question.title}", 0)
                    continue
                if not dry_run:
                    question.place.delete()
                gained += question.size
                yield Removal(f"{question.key} {question.title}", question.size)
            elif question.answers is not None and not busy:
                for removal in _tidied(question, dry_run=dry_run):
                    gained += removal.size
                    yield removal


def _question(folder: Location, answers: StoredAnswers | None) -> Question | None:
    infos = folder.list()
    key, files, damaged = folder.path.rpartition("/")[2], [], 0
    ours = re.fullmatch("[0-9a-f]{32}", key) is not None
    if answers is None and not (ours and any(_is_written(info) for info in infos)):
        return None
    for info in infos:
        damaged += info.base_name.endswith(SET_ASIDE)
        if answers is not None and info.base_name.endswith(SUFFIX):
            with suppress(FileNotFoundError):
                try:
                    files.append(open_file(folder / info.base_name, size=info.size, question=key))
                except DamagedError:
                    damaged += 1
    return Question(
        place=folder,
        answers=answers,
        files=tuple(files),
        num_damaged=damaged,
        size=sum(info.size or 0 for info in infos),
        used_at=max((_changed_at(info) for info in infos), default=0.0),
    )


def _is_written(info: file_systems.FileInfo) -> bool:
    return info.base_name.endswith((SUFFIX, SET_ASIDE, ".json"))


def _tidied(question: Question, *, dry_run: bool) -> Iterator[Removal]:
    """Leftovers, damaged files and second copies of a folder that nobody uses."""
    folder = question.place
    for info in folder.list():
        name, place = info.base_name, folder / info.base_name
        what = ""
        if name.endswith(UNFINISHED):
            what = "left by a writer that died"
        elif name.endswith(SET_ASIDE):
            what = "damaged, set aside"
        elif name.endswith(SUFFIX):
            try:
                check_file(place, question=question.key)
            except DamagedError:
                what = "damaged"
        if what:
            if not dry_run:
                place.delete()
            yield Removal(f"{what}: {place.shown}", info.size)
    yield from _joined(folder, _sound(question), dry_run=dry_run)


def _sound(question: Question) -> list[AnswerFile]:
    names = {info.base_name for info in question.place.list()}
    return [file for file in question.files if file.name in names]


def _joined(folder: Location, files: list[AnswerFile], *, dry_run: bool) -> Iterator[Removal]:
    """Files with second copies of rows, and small ones, written anew as few."""
    copies = second_copies(files)
    holders = {name for name, _, _ in copies}
    small = [f for f in files if f.size < FILE_BYTES // 2]
    chosen = [f for f in files if f.name in holders or (f in small and len(small) > 1)]
    if not chosen:
        return
    before = sum(file.size for file in chosen)
    if dry_run:
        share = len(copies) / max(1, sum(len(b.keys) for f in chosen for b in f.facts))
        yield Removal(_copies_in_words(len(copies), len(chosen)), round(before * share))
        return
    new = rewritten(folder, chosen, without=copies)
    names = {file.name for file in new}
    for file in chosen:
        if file.name not in names:
            file.place.delete()
    freed = before - sum(file.size for file in new)
    yield Removal(_copies_in_words(len(copies), len(chosen)), max(0, freed))


def second_copies(files: list[AnswerFile]) -> set[RowPlace]:
    """Where rows are stored again; the copy that was committed first is what readers take."""
    batches = [(batch, f.name, n) for f in files for n, batch in enumerate(f.facts)]
    seen: set[bytes] = set()
    copies: set[RowPlace] = set()
    for batch, name, number in sorted(batches, key=lambda entry: entry[0].written_at):
        copies |= {(name, number, row) for row, key in enumerate(batch.keys) if key in seen}
        seen.update(batch.keys)
    return copies


def _copies_in_words(copies: int, files: int) -> str:
    return f"{copies:,} second copies of rows, {files:,} files put together"


def _changed_at(info: file_systems.FileInfo) -> float:
    return info.mtime.astimezone(UTC).timestamp() if isinstance(info.mtime, datetime) else 0.0


def _age_s(at: float) -> float:
    return time.time() - at


def _existing(store: Location) -> str:
    """The store's folder, or the nearest above it that exists."""
    assert store.local is not None, "it lies on this machine"
    return str(next(p for p in (store.local, *store.local.parents) if p.exists()))

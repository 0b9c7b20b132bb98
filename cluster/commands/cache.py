"""`tutelage cache`: look at a target store, check it, clear it up; with their printing."""

import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from shared.config.file import load_config, resolve
from shared.errors import ConfigError, DamagedError
from shared.in_words import counted, in_bytes
from shared.locations import Location
from shared.store.upkeep import Choice, Question, clear_up, questions, verify

SECONDS = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
BYTES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def ls(where: str) -> None:
    """`tutelage cache ls`."""
    store = store_of(where)
    found = _questions(store)
    for question in found:
        print(f"{question.key}  {question.title}")
        print(f"  {_held(question)}, last used {_day(question.used_at)}")
    total = in_bytes(sum(question.size for question in found))
    held = f": {counted(len(found), 'question')}, {total}" if found else " is empty"
    print(f"{store.shown}{held}")


def check(where: str, *, delete: bool = False) -> None:
    """`tutelage cache verify`. Raises DamagedError where a file is damaged and stays."""
    store = store_of(where)
    found = _questions(store)
    if not found:
        print(f"{store.shown} is empty")
        return
    size = sum(question.size for question in found)
    bar = tqdm(
        total=size, desc="verifying", unit="B", unit_scale=True, disable=not sys.stderr.isatty()
    )
    damaged = 0
    with bar:
        for damage in verify(store, done=bar.update):
            damaged += 1
            if delete:
                damage.place.delete()
            print(f"{'removed' if delete else 'damaged'}  {damage.place.shown}: {damage.reason}")
    if not damaged:
        print(f"{store.shown}: every file is sound, {in_bytes(size)}")
    elif delete:
        print("tutelage capture CONFIG asks for their rows again")
    else:
        raise DamagedError(
            f"{damaged} file{'s' if damaged != 1 else ''} of {store.shown} "
            f"{'are' if damaged != 1 else 'is'} damaged and never learnt from; `tutelage cache "
            "verify --delete` removes what is damaged, then `tutelage capture CONFIG` asks again"
        )


def gc(
    where: str,
    *,
    older_than: str | None = None,
    teacher: str | None = None,
    question: str | None = None,
    keep_free: str | None = None,
    dry_run: bool = False,
) -> None:
    """`tutelage cache gc`."""
    store = store_of(where)
    for option, value in (("--teacher", teacher), ("--question", question)):
        if value is not None and not value.strip():
            raise ConfigError(
                f"{option} is {value!r}, which would choose every one; write some of its name, or "
                "leave the option out"
            )
    choice = Choice(
        older_than_s=None if older_than is None else seconds_of(older_than),
        teacher=teacher,
        question=question,
    )
    _questions(store)
    size = 0
    kept_free = None if keep_free is None else bytes_of(keep_free)
    for removal in clear_up(store, choice=choice, keep_free=kept_free, dry_run=dry_run):
        size += removal.size
        print(f"{in_bytes(removal.size):>12}  {removal.what}")
    print(f"{in_bytes(size)} {'would become' if dry_run else 'became'} free in {store.shown}")


def store_of(where: str) -> Location:
    """The store of a config, or the one at a folder or address. Raises ConfigError."""
    if "://" in where or Path(where).is_dir():
        return Location.of(where)
    path = Path(where)
    if not path.is_file():
        raise ConfigError(f"{where} does not exist; name a config or the folder of a store")
    store = resolve(load_config(path, ())).targets.store
    if store is None:
        raise ConfigError(
            f"targets.store is not set in {where}; set it there, or name the folder of a store"
        )
    return Location.of(store)


def _questions(store: Location) -> list[Question]:
    """What a store holds. Raises ConfigError for a folder with something else and no answers."""
    found = questions(store)
    if not found and (others := [info.base_name for info in store.list()]):
        raise ConfigError(
            f"{store.shown} is no store: it holds {others[0]}{' and more' * (len(others) > 1)}, "
            "but no answers of a teacher; name the folder of targets.store, or a config"
        )
    return found


def seconds_of(text: str) -> float:
    """An age such as 30d, 12h or 90m. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip().lower())
    if not found:
        raise ConfigError(f"--older-than is {text!r}; write a number and m, h, d or w, as 30d")
    return float(found[1]) * SECONDS[found[2]]


def bytes_of(text: str) -> int:
    """A size such as 50GB. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|kb|mb|gb|tb)", text.strip().lower())
    if not found:
        raise ConfigError(f"--keep-free is {text!r}; write a number and kB, MB, GB or TB, as 50GB")
    return round(float(found[1]) * BYTES[found[2]])


def _held(question: Question) -> str:
    if question.answers is None:
        return in_bytes(question.size)
    damaged = f", {question.num_damaged} damaged files" if question.num_damaged else ""
    return f"{question.holding.in_words()}{damaged}"


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))

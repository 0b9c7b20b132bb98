"""The classes of a run, and what its teachers read of each row."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ValidationError

from shared.config.run import Config
from shared.config.tasks.task import Classification, Marking, Tagging
from shared.data.row_cache import makers, storage_errors
from shared.errors import ConfigError, DataError
from shared.in_words import those
from shared.locking import alone
from shared.prompts.class_reading import ClassReading
from shared.prompts.prefix import Opening
from shared.prompts.row_prompts import (
    RowOpenings,
    RowPrompt,
    read_counts,
    read_row_prompts,
    write_row_prompts,
)
from shared.prompts.verbaliser import Verbaliser
from shared.text.classified import ClassFraming, labels_in, read_classified
from shared.text.framing import DOCUMENTS_PER_CALL
from shared.text.sources import Split, digest_sources, sources_of
from shared.text.tagged import types_in

if TYPE_CHECKING:
    from cluster.planning.handshake import Handshake

FOLDER = "class_prompts"
FORMAT = 2  # of what lies there
CUT, ALIKE = "cut", "alike"
WORDS = ("template", "verbaliser", "calibration", "content_free")
ENDLESS = ("text loses its end", "texts lose their ends")
SHARED = (
    "text is to the student what one before it is, and shares the teacher's answer to that",
    "texts are to the student what ones before them are, and share the teacher's answers to those",
)
ENTITIES_IN_SUMMARY = "summary.json and report.html of the run have its F1"
VALIDATION_ROWS = 10_000  # of a domain at most, unless the config says how many
SPLITS: tuple[Split, ...] = ("train", "validation")
Labelled = Classification | Tagging | Marking  # tasks with names for what rows hold


def with_classes(config: Config) -> Config:
    """The config with the classes, or types of entities, of its training rows, where its task has
    some, and texts that are too long cut. Raises ConfigError for one without rows, DataError for a
    row of one that is not named."""
    task, root = config.task, Path(config.paths.root)
    if isinstance(task, Classification):
        found = labels_in(config.domains, root=root)
        return _of_single_rows(config, _naming(task, "labels", found, "the label"))
    if not isinstance(task, Tagging | Marking):
        return config
    found = types_in(config.domains, root=root)
    if not found:
        raise ConfigError(
            "no training row has an entity, so that there is nothing to find; add rows with some"
        )
    return _of_single_rows(config, _naming(task, "types", found, "an entity of type"))


def _naming(task: Labelled, option: str, found: Mapping[str, str], what: str) -> Labelled:
    """The task with the names that training rows have, each found in a row."""
    asked: list[str] | None = getattr(task, option)
    names = sorted(found) if asked is None else asked
    for name in names:
        if name not in found:
            raise ConfigError(
                f"task.{option} names {name}, which no training row has; add rows of it, or take "
                "it out"
            )
    for name, where in found.items():
        if name not in names:
            raise DataError(
                f"{where} has {what} {name!r}, which is not among task.{option}; add it there, or "
                "leave the row out"
            )
    try:
        return type(task).model_validate(task.model_dump() | {option: names})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise ConfigError(f"task.{first['msg'].removeprefix('Value error, ')}") from None


def _of_single_rows(config: Config, task: Labelled) -> Config:
    """The config with a task whose rows are a text each."""
    data = config.data
    if data.too_long == "split":  # a text has one class, and no second half; a copy is whole
        whole = isinstance(task, Marking)
        data = data.model_copy(update={"too_long": "drop" if whole else "cut"})
    if "validation_rows" not in data.model_fields_set:  # rows of one text each, not packed ones
        data = data.model_copy(update={"validation_rows": VALIDATION_ROWS})
    return config.model_copy(update={"task": task, "data": data})


def refuse_classifier(config: Config, verb: str, way_out: str) -> None:
    """Raise ConfigError where a verb that is of language models is called for a classifier."""
    if config.task.classifies:
        raise ConfigError(
            f"task is {config.task.kind}, and {verb} is of language models; {way_out}"
        )


def refuse_entities(config: Config, verb: str, way_out: str) -> None:
    """Raise ConfigError where a verb that knows no entities is called for a task of them."""
    if isinstance(config.task, Tagging | Marking):
        raise ConfigError(f"task is {config.task.kind}, and {verb} knows no entities; {way_out}")


def refuse_unread_words(config: Config, hands: "Handshake") -> None:
    """Raise ConfigError where words for a language model are set and no teacher is one."""
    task, plain = config.task, Classification()
    readings = [known.reading for known in hands.teachers.values()]
    if any(isinstance(one, Verbaliser) for one in readings):
        return
    for option in WORDS:
        if (value := getattr(task, option)) != getattr(plain, option):
            raise ConfigError(
                f"task.{option} is {value!r}, which language models read, and no teacher is one; "
                "remove it"
            )


@dataclass(frozen=True, slots=True)
class ClassOpenings:
    """What the teacher of a domain reads in place of its rows' texts."""

    openings: RowOpenings
    notes: tuple[str, ...]  # sentences on what became of the texts


def refuse_without_run(config: Config, what: str) -> None:
    """Raise ConfigError where a teacher without a model is asked for what is no run."""
    for name, teacher in config.teachers.items():
        if teacher.engine == "similarity":
            raise ConfigError(
                f"teachers.{name}.engine is similarity, soft labels that a run makes of its own "
                f"rows, and {what} has none; call `tutelage run`"
            )


def class_openings(name: str, config: Config, hands: "Handshake") -> ClassOpenings:
    """Of one domain, from the cache or built. Raises StorageError where the cache is full."""
    reading = hands.teachers[config.teacher_of(name)].reading
    assert reading is not None, "the task has classes"
    folder = Path(config.paths.cache).expanduser().absolute() / FOLDER
    digest = _digest(name, config, hands, reading)
    path = folder / f"{digest}.arrow"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{digest}.lock", making=f"what is read of the texts of {name}"):
            try:
                return _opened(path)
            except (OSError, pa.ArrowException):
                _build(path, _prompts(name, config, hands, reading))
            return _opened(path)


def _build(path: Path, prompts: Iterator[tuple[RowPrompt, bool]]) -> None:
    """Write what is read of each text, by the student's tokens of it: texts that it reads alike
    are shown as the first of them, which is counted."""
    kept: dict[bytes, RowPrompt] = {}
    counts: dict[str, int] = {CUT: 0, ALIKE: 0}
    for prompt, is_cut in prompts:
        first = kept.setdefault(prompt.prompt_ids.tobytes(), prompt)
        shown, own = (one.opening.shown_ids for one in (first, prompt))
        counts[CUT] += is_cut
        counts[ALIKE] += not np.array_equal(shown, own)
    write_row_prompts(path, kept.values(), counts=counts)


def _opened(path: Path) -> ClassOpenings:
    openings, counts = read_row_prompts(path), read_counts(path)
    sentences = (
        (counts[CUT], those(counts[CUT], *ENDLESS) + " for the teacher, which reads no more"),
        (counts[ALIKE], those(counts[ALIKE], *SHARED)),
    )
    return ClassOpenings(openings, tuple(said for count, said in sentences if count))


def _digest(name: str, config: Config, hands: "Handshake", reading: ClassReading) -> str:
    domain, root = config.domains[name], Path(config.paths.root)
    decides = {
        "format": FORMAT,
        "sources": [digest_sources(sources_of(domain, split), root=root) for split in SPLITS],
        "columns": dict(domain.columns),
        "data": config.data.model_dump(),
        "task": config.task.model_dump(),
        "student": hands.rows_digest,
        "teacher": reading.identity,
        "made_by": makers(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _prompts(
    name: str, config: Config, hands: "Handshake", reading: ClassReading
) -> Iterator[tuple[RowPrompt, bool]]:
    """What the teacher reads of each text, with the student's tokens of it, and whether it is cut
    for the teacher."""
    framing = ClassFraming(tuple(config.task.classes))
    domain, root = config.domains[name], Path(config.paths.root)
    tokenizer, ask = hands.load_tokenizer(), reading.ask()
    cut = (lambda: None) if config.data.too_long == "cut" else None
    for split in SPLITS:
        documents = read_classified(domain, split, root=root)
        while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
            shown = reading.read([one.prompt for one in batch], ask)
            framed = {"tokenizer": tokenizer, "context": config.data.context, "cut": cut}
            for read, encoded in zip(shown, framing.encode(batch, **framed), strict=True):
                own = encoded.input_ids[:-1]
                instead = Opening(own, np.array(read.ids, np.int32))
                yield RowPrompt(encoded.where, instead, own, len(own) + 1), read.is_cut

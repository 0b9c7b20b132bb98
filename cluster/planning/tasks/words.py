"""What a teacher reads of the words of tagged rows: each row of its own holds a document for each
word of the student's, the text with that word marked, and its tag."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock

from cluster.planning.handshake import Handshake
from shared.config.run import Config
from shared.config.tasks.task import Tagging
from shared.data.packing import RaggedRows
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import makers, storage_errors
from shared.data.row_store import RowStore, write_rows
from shared.errors import HandshakeError
from shared.prompts.verbaliser import Verbaliser
from shared.targets.asks.classes import Tokens
from shared.text.digests import digest_file
from shared.text.documents import Document
from shared.text.sources import Split
from shared.text.tagged import TagFraming, TaggedText, read_tagged

FOLDER = "word_rows"
FORMAT = 1  # counts up when rows are made in another way
OPENS, CLOSES = "<<< ", " >>>"  # about the word that is asked about, as CLLMFS marks entities


def with_words(
    domains: Iterable[PreparedDomain], config: Config, hands: Handshake
) -> tuple[PreparedDomain, ...]:
    """The domains with the teacher's rows, which lie in the cache or are written there. Raises
    HandshakeError for a text that is longer than the teacher reads, StorageError where the cache is
    full."""
    return tuple(_of_domain(domain, config, hands) for domain in domains)


def marked(text: str, word: tuple[int, int]) -> str:
    """A text with one of its words marked."""
    start, end = word
    return f"{text[:start]}{OPENS}{text[start:end]}{CLOSES}{text[end:]}"


def _of_domain(domain: PreparedDomain, config: Config, hands: Handshake) -> PreparedDomain:
    verbaliser = hands.teachers[config.teacher_of(domain.name)].reading
    assert isinstance(verbaliser, Verbaliser), "the handshake makes no other for words"
    folder = Path(config.paths.cache).expanduser().absolute() / FOLDER
    paths: dict[Split, str] = {}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for split, students in domain.paths.items():
            path = folder / f"{_digest(students, domain.name, config, verbaliser)}.arrow"
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():  # it is renamed into its place when it is whole
                    store = RowStore.open(students)
                    rows = _rows(store, _texts(domain.name, config, hands), verbaliser)
                    draft = path.with_name(f".{path.name}")
                    write_rows(draft, domain=domain.name, rows=rows)
                    draft.replace(path)
            paths[split] = str(path)
    return replace(domain, teacher_paths=paths)


def _digest(students: str, name: str, config: Config, verbaliser: Verbaliser) -> str:
    decides = {
        "format": FORMAT,
        "rows": digest_file(Path(students)),
        "columns": dict(config.domains[name].columns),
        "task": config.task.model_dump(),
        "teacher": verbaliser.identity,
        "made_by": makers(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _texts(name: str, config: Config, hands: Handshake) -> Iterator[tuple[Document, TaggedText]]:
    """The texts of both splits as the student reads them, whole ones and cut ones."""
    assert isinstance(config.task, Tagging), "it has words"
    framing, root = TagFraming(tuple(config.task.classes)), Path(config.paths.root)
    cut = (lambda: None) if config.data.too_long == "cut" else None
    for split in ("train", "validation"):
        documents = read_tagged(config.domains[name], split, root=root)
        read = {"tokenizer": hands.load_tokenizer(), "context": config.data.context, "cut": cut}
        yield from framing.texts(documents, **read)


def _rows(
    store: RowStore, texts: Iterable[tuple[Document, TaggedText]], verbaliser: Verbaliser
) -> RaggedRows:
    """The teacher's rows of a file. Texts that the student reads alike are shown as the first."""
    first: dict[bytes, tuple[Document, TaggedText]] = {}
    for document, text in texts:
        first.setdefault(text.ids_T.tobytes(), (document, text))
    found, classes = RaggedRows([], [], []), verbaliser.ask().classes
    for number in range(len(store)):
        row = store.take([number])
        (ids,), (mask,) = row.column("input_ids"), row.column("loss_mask")
        length = len(ids) - int(mask.sum())
        document, text = first[np.ascontiguousarray(ids[:length], np.int32).tobytes()]
        asked = [marked(document.prompt, (word.start, word.end)) for word in text.words_K]
        prompts = verbaliser.framed(asked)
        _refuse_overlong(document, prompts, classes, verbaliser)
        _add(found, prompts, ids[length:])
    return found


def _add(found: RaggedRows, prompts: list[list[int]], tags: np.ndarray) -> None:
    """A row of a document for each prompt, whose tag has the place of a next token."""
    documents = [np.array([*ids, tag], np.int32) for ids, tag in zip(prompts, tags, strict=True)]
    lengths = np.array([len(one) for one in documents])
    mask = np.zeros(lengths.sum(), np.uint8)
    mask[np.cumsum(lengths) - 2] = 1
    found.input_ids.append(np.concatenate(documents))
    found.doc_starts.append(np.cumsum([0, *lengths[:-1]]).astype(np.int32))
    found.loss_masks.append(mask)


def _refuse_overlong(
    document: Document, prompts: list[list[int]], classes: tuple[Tokens, ...], by: Verbaliser
) -> None:
    longest = max(map(len, prompts)) + max(map(len, classes))
    if by.limit is not None and longest > by.limit:
        raise HandshakeError(
            f"{document.where} has {longest} tokens as {by.teacher} reads it with task.template "
            f"and a tag, which reads {by.limit}; shorten the template, or leave the row out"
        )

"""What a teacher reads of the words of tagged rows.

Of a causal language model each row of its own holds a document for each word of the student's, the
text with that word marked, and its tag. Of a token classifier it holds the text by the teacher's
tokenizer, with loss at the first token of each word, and then the tags; words that share a first
token are in documents of their own.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import xxhash

from cluster.planning.handshake import Handshake
from shared.config.run import Config
from shared.data.packing import RaggedRows
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import makers, storage_errors
from shared.data.row_store import RowStore, write_rows
from shared.errors import HandshakeError
from shared.locking import alone
from shared.prompts.class_reading import OwnHead
from shared.prompts.marking import marked
from shared.prompts.verbaliser import Verbaliser
from shared.targets.asks.classes import Tokens
from shared.text.digests import digest_file
from shared.text.documents import Document
from shared.text.framings import framing_of
from shared.text.sources import Split, digest_sources, sources_of
from shared.text.tagged import TagFraming, TaggedText

Reading = Verbaliser | OwnHead

FOLDER = "word_rows"
FORMAT = 2  # counts up when rows are made in another way


def with_words(
    domains: Iterable[PreparedDomain], config: Config, hands: Handshake
) -> tuple[PreparedDomain, ...]:
    """The domains with the teacher's rows, which lie in the cache or are written there. Raises
    HandshakeError for a text that is longer than the teacher reads, StorageError where the cache is
    full."""
    return tuple(_of_domain(domain, config, hands) for domain in domains)


def _of_domain(domain: PreparedDomain, config: Config, hands: Handshake) -> PreparedDomain:
    reading = hands.teachers[config.teacher_of(domain.name)].reading
    assert isinstance(reading, Verbaliser | OwnHead), "the handshake makes no other for words"
    folder = Path(config.paths.cache).expanduser().absolute() / FOLDER
    paths: dict[Split, str] = {}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for split, students in domain.paths.items():
            path = folder / f"{_digest(students, domain.name, config, hands, reading)}.arrow"
            with alone(path.with_suffix(".lock"), making=f"the teacher's words of {domain.name}"):
                if not path.exists():  # it is renamed into its place when it is whole
                    store = RowStore.open(students)
                    rows = _rows(store, _texts(domain.name, split, config, hands), reading)
                    draft = path.with_name(f".{path.name}")
                    write_rows(draft, domain=domain.name, rows=rows)
                    draft.replace(path)
            paths[split] = str(path)
    return replace(domain, teacher_paths=paths)


def _digest(students: str, name: str, config: Config, hands: Handshake, reading: Reading) -> str:
    domain, root = config.domains[name], Path(config.paths.root)
    splits: tuple[Split, ...] = ("train", "validation")
    decides = {
        "format": FORMAT,
        "rows": digest_file(Path(students)),
        "sources": [digest_sources(sources_of(domain, split), root=root) for split in splits],
        "columns": dict(domain.columns),
        "task": config.task.model_dump(),
        "student": hands.rows_digest,
        "teacher": reading.identity,
        "made_by": makers(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _texts(
    name: str, split: Split, config: Config, hands: Handshake
) -> Iterator[tuple[Document, TaggedText]]:
    """The texts of which a split's rows are some, in their order, as the student reads them."""
    framing, domain = framing_of(config), config.domains[name]
    assert isinstance(framing, TagFraming), "it has words"
    cut = (lambda: None) if config.data.too_long == "cut" else None
    source: Split = "train" if domain.validation is None else split  # some were held out
    documents = framing.read(domain, source, root=Path(config.paths.root))
    read = {"tokenizer": hands.load_tokenizer(), "context": config.data.context, "cut": cut}
    return framing.texts(documents, **read)


def _rows(
    store: RowStore, texts: Iterable[tuple[Document, TaggedText]], reading: Reading
) -> RaggedRows:
    """The teacher's rows of a file, each of the next text that the student reads so."""
    waiting = cycle(texts)
    found, add = RaggedRows([], [], []), _adding(reading)
    for number in range(len(store)):
        row = store.take([number])
        (ids,), (mask,) = row.column("input_ids"), row.column("loss_mask")
        length = len(ids) - int(mask.sum())
        places = np.flatnonzero(mask).tolist()
        document, text = next(
            (document, text)
            for document, text in waiting
            if text.at_K == places and np.array_equal(text.ids_T, ids[:length])
        )
        add(found, document, text, ids[length:])
    return found


def _adding(reading: Reading) -> Callable[[RaggedRows, Document, TaggedText, np.ndarray], None]:
    """What adds the teacher's row of a text, its words and their tags."""
    if isinstance(reading, OwnHead):
        return partial(_add_text, reading=reading)
    return partial(_add_marked, by=reading, classes=reading.ask().classes)


def _add_text(
    found: RaggedRows, document: Document, text: TaggedText, tags: np.ndarray, *, reading: OwnHead
) -> None:
    """A row of the text and its tags, and again of those words whose token has one already."""
    words = [(word.start, word.end) for word in text.words_K]
    ids, tokens = reading.with_words(text.read_of(document), words, where=document.where)
    parts: list[list[int]] = []
    for number, token in enumerate(tokens):
        if not parts or token <= tokens[parts[-1][-1]]:
            parts.append([])
        parts[-1].append(number)
    documents, masks = [], []
    for part in parts:
        documents.append(np.array([*ids, *tags[part]], np.int32))
        masks.append(np.zeros(len(documents[-1]), np.uint8))
        masks[-1][[tokens[number] for number in part]] = 1
    starts = np.cumsum([0, *map(len, documents[:-1])])
    found.input_ids.append(np.concatenate(documents))
    found.doc_starts.append(starts.astype(np.int32))
    found.loss_masks.append(np.concatenate(masks))


def _add_marked(
    found: RaggedRows,
    document: Document,
    text: TaggedText,
    tags: np.ndarray,
    *,
    by: Verbaliser,
    classes: tuple[Tokens, ...],
) -> None:
    """A row of a document for each word, whose tag has the place of a next token."""
    prompts = by.framed([marked(text.read_of(document), [word]) for word in text.words_K])
    _refuse_overlong(document, prompts, classes, by)
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
            f"and a tag, which reads {by.limit}; shorten the template, leave the row out, or lower "
            "data.context"
        )

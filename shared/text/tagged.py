"""Rows of a text and the entities in it, as documents and as token ids.

A row is `{"text", "entities"}` or `{"prompt", "response"}`, or has the columns that the domain
names. Entities are a list, or JSON of one, of `{"start", "end", "type"}`, whose numbers count
characters from 0 and `end` is the one after the last, or of `{"text", "type"}`, of which each is at
the first place, from left to right, where its text stands as whole words that no entity before it
in the list has taken.

Words are runs of letters and digits, and every other character that is no space by itself; so is
every letter of scripts that write no spaces between words. A word
is tagged at its first token; words that share a first token are one.

T tokens of a text   K words of it
"""

import json
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.config.domains import Domain
from shared.config.tasks.task import OUTSIDE
from shared.errors import DataError
from shared.text.classified import field_of, read_of, text_in
from shared.text.documents import Columns, Document, Field
from shared.text.formats import as_string
from shared.text.framing import (
    DOCUMENTS_PER_CALL,
    Encoded,
    Remarks,
    Tokenizer,
    content_key,
    with_offsets,
)
from shared.text.sources import Silent, Split, nothing, read_documents, sources_of

ENTITIES: tuple[Field, ...] = ("entities", "response")
# Letters of scripts that write no spaces: Thai to Khmer, kana, ideographs.
ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
ALONE += "\U00020000-\U0003ffff"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+|[^\w\s]")


class Span(NamedTuple):
    """An entity, or a word, in characters of a text."""

    start: int
    end: int  # the character after its last
    type: str = ""


@dataclass(frozen=True, slots=True)
class TaggedText:
    """A text as its student reads it."""

    ids_T: np.ndarray
    at_K: list[int]  # the token of each word
    words_K: list[Span]
    tags_K: list[str]
    is_cut: bool = False  # whether the document goes on

    def read_of(self, document: Document) -> str:
        """What of its document's text it has."""
        return document.prompt[: self.words_K[-1].end] if self.is_cut else document.prompt


def tagged_of(row: object, where: str, columns: Columns) -> Document:
    """A row as a document, whose response is the JSON of its spans. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is no object with a text and entities; correct the row")
    text = text_in(row, where, columns)
    told = field_of(row, where, columns, ENTITIES)
    if isinstance(told, str):
        try:
            told = json.loads(told)
        except (ValueError, RecursionError):
            told = None
    if not isinstance(told, list):
        raise DataError(f"{where}: its entities are no list, nor JSON of one; correct the row")
    spans: list[Span] = []
    for entity in told:
        spans.append(_span_of(entity, text, where, spans))
    document = Document("pair", where, prompt=text, response=json.dumps(sorted(spans)))
    return read_of(document, row, columns, ENTITIES)


def spans_of(document: Document) -> list[Span]:
    """The entities of a document, from left to right."""
    return [Span(*span) for span in json.loads(document.response)]


def _span_of(entity: Any, text: str, where: str, taken: Sequence[Span]) -> Span:
    """Raises DataError for one that is not there, or not whole, and for one that overlaps."""
    fields = entity if isinstance(entity, Mapping) else {}
    name, start, end = (fields.get(part) for part in ("type", "start", "end"))
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{where}: the entity {entity!r:.60} names no type; write start, end and type, or text "
            "and type"
        )
    if as_string(name, where, "a type") == OUTSIDE or name[:2] in ("B-", "I-"):
        raise DataError(
            f"{where}: the entity {entity!r:.60} has a tag for its type; write an entity whole, "
            "with the name after B- or I- as its type, and none of what is outside"
        )
    if start is None and end is None:
        return _found(fields.get("text"), name, text, where, taken)
    if type(start) is not int or type(end) is not int:
        raise DataError(
            f"{where}: an entity of type {name} is from {start!r} to {end!r}; write start and end "
            "as whole numbers"
        )
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: an entity of type {name} is from {start} to {end}, but the text has "
            f"{len(text)} characters; correct its offsets, or leave the row out"
        )
    span = Span(start, end, name)
    if not _is_whole(text, start, end):
        raise DataError(
            f"{where}: the entity {text[start:end]!r:.40} begins or ends within a word or at a "
            "space; move its offsets to whole words"
        )
    said = fields.get("text")
    if isinstance(said, str) and said.strip() != text[start:end].strip():
        raise DataError(
            f"{where}: the entity {said!r:.40} is {text[start:end]!r:.40} from {start} to {end}; "
            "count characters from 0, not bytes or tokens, or leave its text out"
        )
    if any(_overlap(span, other) for other in taken):
        raise DataError(
            f"{where}: the entity {text[start:end]!r:.40} overlaps another, and a word has one "
            "tag; keep one of them"
        )
    return span


def _found(wanted: Any, name: str, text: str, where: str, taken: Sequence[Span]) -> Span:
    """The first place of an entity's text that is free."""
    wanted = wanted.strip() if isinstance(wanted, str) else ""
    places = [at.start() for at in re.finditer(f"(?={re.escape(wanted)})", text)] if wanted else []
    whole = [Span(at, at + len(wanted), name) for at in places]
    whole = [span for span in whole if _is_whole(text, span.start, span.end)]
    for span in whole:
        if not any(_overlap(span, other) for other in taken):
            return span
    why = "overlaps others wherever it stands" if whole else "is not in the text as whole words"
    raise DataError(
        f"{where}: the entity {wanted!r:.40} of type {name} {why}; correct it, or leave it out"
    )


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end


def _is_whole(text: str, start: int, end: int) -> bool:
    words = [match.span() for match in WORD.finditer(text)]
    return any(start == first for first, _ in words) and any(end == last for _, last in words)


def read_tagged(
    domain: Domain, split: Split, *, root: Path, silent: Silent = nothing
) -> Iterator[Document]:
    """The rows of a split of a domain; see `read_documents`. Raises DataError for one that cannot
    be tagged."""
    told = {"columns": domain.columns, "make": tagged_of, "silent": silent}
    return read_documents(sources_of(domain, split), root=root, **told)


def read_episode(
    domain: Domain,
    split: Split,
    *,
    root: Path,
    shots: int | None,
    seed: int,
    silent: Silent = nothing,
) -> Iterator[Document]:
    """The same; where `shots` is said, of training rows those that are `drawn` of rows whose text
    no validation row has."""
    documents = read_tagged(domain, split, root=root, silent=silent)
    if shots is None or split != "train":
        return documents
    held_out = {document.prompt for document in read_tagged(domain, "validation", root=root)}
    left = [document for document in documents if document.prompt not in held_out]
    return iter(drawn(left, shots=shots, seed=seed))


def types_in(domains: Mapping[str, Domain], *, root: Path) -> dict[str, str]:
    """Types of entities in training rows of all domains, each with the first row that has it."""
    found: dict[str, str] = {}
    for domain in domains.values():
        for document in read_tagged(domain, "train", root=root):
            for span in spans_of(document):
                found.setdefault(span.type, document.where)
    return found


def drawn(documents: Sequence[Document], *, shots: int, seed: int) -> list[Document]:
    """Rows with `shots` entities of each type, or all that there are, in their order.

    Rows come in an order that the seed decides. Type by type, the rarest first, those with an
    entity of it are taken until there are enough, rows taken for another type counted too (the
    greedy sampling of Few-NERD, arXiv 2105.07464).
    """
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    types = [Counter(span.type for span in spans_of(document)) for document in documents]
    total, had, taken = sum(types, Counter()), Counter(), set()
    for name in sorted(total, key=lambda name: (total[name], name)):
        for number in order:
            if had[name] >= shots:
                break
            if types[number][name] and number not in taken:
                taken.add(number)
                had += types[number]
    return [documents[number] for number in sorted(taken)]


@dataclass(frozen=True, slots=True)
class TagFraming:
    """How texts and their tags become token ids: those of the text, and after them the number of
    the tag of each word, whose first token has the loss."""

    labels: tuple[str, ...]
    shots: int | None = None
    episode: int = 0

    @property
    def identity(self) -> Any:
        """What decides rows beside their text."""
        return ["tagging", self.labels, self.shots, self.episode]

    def read(
        self, domain: Domain, split: Split, *, root: Path, silent: Silent = nothing
    ) -> Iterator[Document]:
        """The rows of a split; of training rows those of the episode."""
        told = {"root": root, "shots": self.shots, "seed": self.episode, "silent": silent}
        return read_episode(domain, split, **told)

    def encode(
        self,
        documents: Iterable[Document],
        *,
        tokenizer: Tokenizer,
        context: int,
        cut: Callable[[], None] | None,
    ) -> Iterator[Encoded]:
        """Token ids and loss masks in order. With `cut`, a text that is longer than `context` with
        its tags loses its end, and is told. Raises DataError for a type that is
        not known."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        texts = self.texts(documents, tokenizer=tokenizer, context=context, cut=cut)
        for document, text in texts:
            unknown = next((tag for tag in text.tags_K if tag not in numbers), None)
            if unknown is not None:
                raise DataError(
                    f"{document.where} has an entity of type {unknown[2:]!r}, which is not among "
                    "task.types or those of the training rows; correct it, or leave it out"
                )
            tags = np.array([numbers[tag] for tag in text.tags_K], np.int32)
            mask = np.zeros(len(text.ids_T) + len(tags), np.uint8)
            mask[text.at_K] = 1
            yield Encoded(
                key=content_key(document),
                where=document.where,
                input_ids=np.concatenate([text.ids_T, tags]),
                loss_mask=mask,
                num_chars=len(document.prompt),
                remarks=Remarks(kind="pair", unread=document.unread),
            )

    def texts(
        self,
        documents: Iterable[Document],
        *,
        tokenizer: Tokenizer,
        context: int,
        cut: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Document, TaggedText]]:
        """Documents, and each as its student reads it."""
        waiting = iter(documents)
        while batch := list(islice(waiting, DOCUMENTS_PER_CALL)):
            found = _read(batch, tokenizer)
            if cut is not None:
                for number, text in enumerate(found):
                    if len(text.ids_T) + len(text.at_K) > context:
                        most = _most(text, context)
                        (shorter,) = _read(batch[number : number + 1], tokenizer, most=most)
                        found[number] = replace(shorter, is_cut=True)
                        cut()
            yield from zip(batch, found, strict=True)


def _most(text: TaggedText, context: int) -> int:
    """Tokens of a text that fit with the tags of their words."""
    sizes = range(context, 0, -1)
    return next((n for n in sizes if n + bisect_left(text.at_K, n) <= context), 1)


def _read(
    batch: Sequence[Document], tokenizer: Tokenizer, *, most: int | None = None
) -> list[TaggedText]:
    """Texts as the tokenizer frames them, `most` tokens of each where that is said. Raises
    DataError for a tokenizer without offsets."""
    if not batch:
        return []
    if not getattr(tokenizer, "is_fast", True):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no fast form (tokenizer.json); "
            "convert it with transformers first"
        )
    options = {} if most is None else {"truncation": True, "max_length": most}
    read = with_offsets(tokenizer, [document.prompt for document in batch], **options)
    both = zip(batch, read, strict=True)
    return [_tagged(document, ids, offsets) for document, (ids, offsets) in both]


def _tagged(document: Document, ids: list[int], offsets: list[tuple[int, int]]) -> TaggedText:
    """Raises DataError for a text of no token."""
    if not ids:
        raise DataError(f"{document.where}: its text has no token; leave the row out")
    text, entities = document.prompt, spans_of(document)
    at_K: list[int] = []
    words_K: list[Span] = []
    tags_K: list[str] = []
    token = 0
    for match in WORD.finditer(text):
        start, end = match.span()
        while token < len(ids) and (offsets[token][1] <= start or not _holds(offsets[token])):
            token += 1
        if token == len(ids) or offsets[token][0] >= end:
            continue  # beyond what is read, or no token is of it
        tag = _tag(start, end, entities)
        if at_K and at_K[-1] == token:  # one word with those before it
            words_K[-1] = Span(words_K[-1].start, end)
            tags_K[-1] = _stronger(tags_K[-1], tag)
            continue
        at_K.append(token)
        words_K.append(Span(start, end))
        tags_K.append(tag)
    return TaggedText(np.array(ids, np.int32), at_K, words_K, tags_K)


def _holds(offsets: tuple[int, int]) -> bool:
    return offsets[1] > offsets[0]


def _tag(start: int, end: int, entities: Sequence[Span]) -> str:
    for entity in entities:
        if entity.start <= start and end <= entity.end:
            return f"{'B' if entity.start == start else 'I'}-{entity.type}"
    return OUTSIDE


def _stronger(one: str, other: str) -> str:
    """Of words that are one the tag that begins an entity, else that inside of one."""
    return min(one, other, key=lambda tag: "BIO".index(tag[0]))

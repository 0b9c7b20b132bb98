"""What models are asked to write in an evaluation: openings of validation text, each with what is
right to follow.

Of a prompt with a response, or a conversation, everything before its last answer is the opening;
the answer is right. Of plain text some of its first tokens are, and what follows is shown beside
what models write, but scored by nothing.

D documents   T tokens of one
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cluster.prompt_search.splits import question
from shared.config.adaptive_losses import reads_pairs
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.text.documents import CALLS, Document
from shared.text.framing import Encoded, content_key, encode
from shared.text.preferences import read_chosen
from shared.text.sources import Split, read_documents, sources_of

SPARE = 2  # times the documents asked for are drawn, since some cannot be used
OF_TEXT = 4  # openings of plain text in a domain, at most
OPENING, FOLLOWING = 32, 48  # tokens of plain text: its opening, at most, and what is written on
LEAST = 8  # tokens of an opening of plain text, and of what follows


@dataclass(frozen=True, slots=True)
class Item:
    """One opening and what is right to follow, in tokens of one tokenizer."""

    domain: str
    key: str  # the same in every run that has this document and tokenizer
    ids: np.ndarray  # int32 [T]
    num_opening: int  # the first tokens, which models are shown
    num_right: int  # tokens that follow them
    document: Document | None = None  # None: plain text

    @property
    def is_scored(self) -> bool:
        """Whether there is a right answer."""
        return self.document is not None

    @property
    def right_ids(self) -> np.ndarray:
        """Ids of what is right to follow."""
        return self.ids[self.num_opening : self.num_opening + self.num_right]

    def shown(self, tokenizer: Any) -> str:
        """The opening as a person reads it."""
        if self.document is not None:
            return question(self.document)
        return tokenizer.decode(self.ids[: self.num_opening], skip_special_tokens=True)


def items_of(
    config: Config, domain: PreparedDomain, tokenizer: Any, *, count: int, seed: int
) -> list[Item]:
    """At most `count` items of a domain's validation text, drawn by a hash of (seed, content), so
    that a new document moves no other."""
    store = RowStore.open(domain.validation_path)
    found: list[Item] = []
    if config.data.loss_on == "everything" or _has_prompts(store):
        documents = _candidates(config, domain, store, count=count, seed=seed)
        usable = usable_items(documents, config, domain.name, tokenizer)
        if config.domains[domain.name].validation is None:
            held_out = {ids.tobytes() for ids, _ in _documents(store)}
            usable = (item for item in usable if item.ids.tobytes() in held_out)
        found = sorted(usable, key=lambda item: _order(seed, item.key))[:count]
    return found or _openings_of_text(store, domain.name, count=min(count, OF_TEXT), seed=seed)


def framed_by(tokenizer: Any, items: Iterable[Item], config: Config) -> list[Item]:
    """The same items in tokens of another tokenizer of the same vocabulary; plain text, whose
    opening is no whole document, stays as it is."""
    return [
        item
        if item.document is None
        else _with_ids(item, _encoded(item.document, tokenizer, config))
        for item in items
    ]


def rows_of(items: list[Item]) -> Rows:
    """Items as rows whose loss begins where the opening ends."""
    masks = [np.zeros(len(item.ids), np.uint8) for item in items]
    for item, mask in zip(items, masks, strict=True):
        mask[item.num_opening - 1 : -1] = 1
    return Rows.build(
        domains=[item.domain for item in items],
        indices=range(len(items)),
        input_ids=[item.ids for item in items],
        doc_starts=[np.zeros(1, np.int32)] * len(items),
        loss_masks=masks,
    )


def _has_prompts(store: RowStore) -> bool:
    """Whether any document begins with tokens that are not learnt."""
    return any(len(mask) > 1 and not mask[0] for _, mask in _documents(store))


def _documents(store: RowStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and loss mask of each document of a store."""
    for rows in store.units(256):
        columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        for ids, starts, mask in zip(*columns, strict=True):
            cuts = starts[1:]
            yield from zip(np.split(ids, cuts), np.split(mask, cuts), strict=True)


def _candidates(
    config: Config, domain: PreparedDomain, store: RowStore, *, count: int, seed: int
) -> list[Document]:
    """Documents among which those asked for are: of validation text the first in their order, of
    training text those with the smallest keys, which are held out."""
    asked = config.domains[domain.name]
    is_held_out = asked.validation is None
    root = Path(config.paths.root)
    split: Split = "train" if is_held_out else "validation"
    if reads_pairs(config.losses):
        read = read_chosen(asked, split, root=root)
    else:
        read = read_documents(sources_of(asked, split), root=root, columns=asked.columns)
    keyed = ((content_key(document), document) for document in read)
    if is_held_out:
        most = SPARE * sum(1 for _ in _documents(store))
        found = heapq.nsmallest(most, keyed, key=lambda pair: pair[0])
    else:
        found = heapq.nsmallest(SPARE * count, keyed, key=lambda pair: _order(seed, _hex(pair[0])))
    return list(dict(found).values())


def usable_items(
    documents: Iterable[Document], config: Config, domain: str, tokenizer: Any
) -> Iterator[Item]:
    """Items of documents that fit the context as they are and end with a learnt answer."""
    for document in filter(_is_answered, documents):
        encoded = _encoded(document, tokenizer, config)
        if len(encoded.input_ids) <= config.data.context and encoded.loss_mask.any():
            whole = Item(domain, _hex(encoded.key), encoded.input_ids, 0, 0, document)
            yield _with_ids(whole, encoded)


def _is_answered(document: Document) -> bool:
    if document.kind == "pair":
        return True
    if document.kind == "text" or not document.messages:
        return False
    last = document.messages[-1]
    answers = last.role == "assistant" if last.learnt is None else last.learnt
    return answers and not any(last.more.get(key) for key in CALLS)


def _encoded(document: Document, tokenizer: Any, config: Config) -> Encoded:
    special_tokens = config.data.special_tokens
    (one,) = encode(
        iter([document]), tokenizer=tokenizer, loss_on="responses", special_tokens=special_tokens
    )
    return one


def _with_ids(item: Item, encoded: Encoded) -> Item:
    """An item in the tokens of its document, whose last answer is the last run of loss."""
    learnt_K = np.flatnonzero(encoded.loss_mask)
    runs = np.split(learnt_K, np.flatnonzero(np.diff(learnt_K) > 1) + 1)
    ids, num_opening = encoded.input_ids, int(runs[-1][0]) + 1
    return replace(item, ids=ids, num_opening=num_opening, num_right=len(runs[-1]))


def _openings_of_text(store: RowStore, domain: str, *, count: int, seed: int) -> list[Item]:
    found: dict[str, Item] = {}
    for ids, _ in _documents(store):
        num_opening = min(OPENING, len(ids) // 2)
        if num_opening >= LEAST:
            part = np.ascontiguousarray(ids[: num_opening + FOLLOWING])
            key = _hex(xxhash.xxh3_64_intdigest(part.tobytes()))
            found[key] = Item(domain, key, part, num_opening, len(part) - num_opening)
    return heapq.nsmallest(count, found.values(), key=lambda item: _order(seed, item.key))


def _hex(key: int) -> str:
    return f"{key:016x}"


def _order(seed: int, key: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{key}".encode())

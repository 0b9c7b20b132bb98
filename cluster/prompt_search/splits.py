"""The examples of a domain that a search looks at: three splits of its training text.

Documents are drawn by a hash of (seed, content), so that a new document moves no other. No two
have the same question, none is validation text.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data.rows import Rows
from shared.data.tokenise import HELD_OUT
from shared.errors import ConfigError, DataError
from shared.prompts.prompts import Example
from shared.text.documents import Document, Kind
from shared.text.framing import Encoded, content_key, encode
from shared.text.sources import read_documents, sources_of

SPARE = 2  # times the documents asked for are drawn, since some cannot be used
NUM_LONGEST = 8  # documents, by their characters, among which the longest in tokens is found


@dataclass(frozen=True, slots=True)
class Split:
    """Documents, each a row of its own."""

    rows: Rows
    documents: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """Identity of the rows in their order."""
        return xxhash.xxh3_128_hexdigest(b"".join(self.rows.hashes()))


@dataclass(frozen=True, slots=True)
class Task:
    """What a search needs to know of a domain."""

    domain: str
    kind: Kind
    metric: str  # accuracy or likelihood
    dev: Split
    confirm: Split
    pool: tuple[Example, ...]
    longest: int  # tokens of the domain's longest document
    longest_answer: int  # tokens of the longest right answer
    stop_ids: tuple[int, ...]
    tokenizer: Any

    @property
    def questions(self) -> tuple[str, ...]:
        """The development set's questions."""
        return tuple(question(document) for document in self.dev.documents)


def task_of(name: str, config: Config, tokenizer: Any) -> Task:
    """Draw a domain's splits. Raises ConfigError for a metric that does not fit the domain and
    DataError for too little text."""
    settings, drawn = config.prompt_search, _drawn(name, config)
    kind = _only_kind(name, [document for document, _ in drawn.documents])
    metric = settings.metric
    if metric == "auto":
        metric = "accuracy" if kind == "pair" else "likelihood"
    if metric == "accuracy" and kind != "pair":
        raise ConfigError(
            f"prompt_search.metric is accuracy, but the rows of domain {name} are not prompts "
            "with responses, which alone have a right answer; take likelihood or auto"
        )
    context = config.data.context
    usable = list(_usable(drawn, tokenizer, config.data, whole=metric == "accuracy"))
    wanted = settings.dev_documents + settings.confirm_documents
    if len(usable) < wanted:
        raise DataError(
            f"domain {name} has {len(usable)} different training documents that can be tried, but "
            f"the search needs {settings.dev_documents} to develop on and "
            f"{settings.confirm_documents} to confirm on; add text, or lower "
            "prompt_search.dev_documents and confirm_documents"
        )
    dev, confirm = usable[: settings.dev_documents], usable[settings.dev_documents : wanted]
    pool = [d for d, one in usable[wanted:] if len(one.input_ids) <= context // 2]
    longest = [one for _, one in _usable(drawn.longest_only(), tokenizer, config.data)]
    tried = [*dev, *confirm]
    return Task(
        domain=name,
        kind=kind,
        metric=metric,
        dev=_split(name, dev),
        confirm=_split(name, confirm),
        pool=tuple(_examples(pool)[: settings.pool_documents]),
        longest=max(len(one.input_ids) for one in [*longest, *(one for _, one in tried)]),
        longest_answer=max(int(one.loss_mask.sum()) for _, one in tried),
        stop_ids=_stop_ids([one for _, one in tried], tokenizer),
        tokenizer=tokenizer,
    )


def question(document: Document) -> str:
    """What an answer is asked about; of a document without one, the document."""
    if document.kind == "pair":
        return document.prompt
    return document.text or "\n".join(message.content for message in document.messages[:-1])


@dataclass(frozen=True, slots=True)
class _Drawn:
    documents: list[tuple[Document, int]]  # with content keys, in the order they are drawn
    held_out: frozenset[int]  # smallest keys, of which validation rows may be made
    longest: list[Document]

    def longest_only(self) -> "_Drawn":
        return _Drawn([(d, content_key(d)) for d in self.longest], frozenset(), [])


def _drawn(name: str, config: Config) -> _Drawn:
    """Enough documents, the keys that may be held out, and the longest documents."""
    domain, root, settings = config.domains[name], Path(config.paths.root), config.prompt_search
    count = settings.dev_documents + settings.confirm_documents + settings.pool_documents
    keys: list[int] = []
    longest: list[tuple[int, int, Document]] = []

    def documents() -> Iterator[tuple[int, int, Document]]:
        for key, document in _different(domain, root):
            keys.append(key)
            size = sum(map(len, document.strings))
            heapq.heappush(longest, (size, key, document))
            if len(longest) > NUM_LONGEST:
                heapq.heappop(longest)
            order = xxhash.xxh3_64_intdigest(f"{config.seed}/{key}".encode())
            yield order, key, document

    drawn = heapq.nsmallest(SPARE * count, documents(), key=lambda entry: entry[:2])
    held_out: frozenset[int] = frozenset()
    if domain.validation is None:
        # Twice as many as are held out, since some may have no token to learn.
        held_out = frozenset(sorted(keys)[: 2 * max(1, int(HELD_OUT * len(keys)))])
    pairs = [(document, key) for _, key, document in drawn]
    return _Drawn(pairs, held_out, [document for _, _, document in longest])


def _different(domain: Domain, root: Path) -> Iterator[tuple[int, Document]]:
    """Training documents whose question is neither in the validation text nor came before."""
    seen = {
        _hash(question(document))
        for document in read_documents(
            sources_of(domain, "validation"), root=root, columns=domain.columns
        )
    }
    for document in read_documents(sources_of(domain, "train"), root=root, columns=domain.columns):
        asked = _hash(question(document))
        if asked not in seen:
            seen.add(asked)
            yield content_key(document), document


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())


def _usable(
    drawn: _Drawn, tokenizer: Any, data: Data, *, whole: bool = False
) -> Iterator[tuple[Document, Encoded]]:
    """Documents with a token to learn, cut to the context, or `whole` ones alone."""
    context, special_tokens = data.context, data.special_tokens
    documents = [document for document, key in drawn.documents if key not in drawn.held_out]
    encoded = encode(
        iter(documents), tokenizer=tokenizer, loss_on="responses", special_tokens=special_tokens
    )
    for document, one in zip(documents, encoded, strict=True):
        if whole and len(one.input_ids) > context:
            continue
        ids, mask = one.input_ids[:context], one.loss_mask[:context].copy()
        if len(mask):
            mask[-1] = 0
        if mask.any():
            yield document, replace(one, input_ids=ids, loss_mask=mask)


def _only_kind(name: str, documents: list[Document]) -> Kind:
    kinds: list[Kind] = list(dict.fromkeys(document.kind for document in documents))
    if len(kinds) > 1:
        raise ConfigError(
            f"domain {name} has rows of kinds {' and '.join(kinds)}, which a prompt would open "
            "differently; make them domains of their own"
        )
    return kinds[0] if kinds else "text"


def _split(name: str, pairs: list[tuple[Document, Encoded]]) -> Split:
    rows = Rows.build(
        domains=[name] * len(pairs),
        indices=range(len(pairs)),
        input_ids=[one.input_ids for _, one in pairs],
        doc_starts=[np.zeros(1, np.int32)] * len(pairs),
        loss_masks=[one.loss_mask for _, one in pairs],
    )
    return Split(rows, tuple(document for document, _ in pairs))


def _examples(documents: list[Document]) -> list[Example]:
    """Documents as worked examples; conversations of several turns are none."""
    found = []
    for document in documents:
        if document.kind == "pair":
            found.append(Example(document.prompt, document.response))
        elif document.kind == "text":
            found.append(Example("", document.text))
        elif [message.role for message in document.messages] == ["user", "assistant"]:
            found.append(Example(*(message.content for message in document.messages)))
    return found


def _stop_ids(encoded: list[Encoded], tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that end a document: eos, or what a chat template puts after an answer."""
    special = set(tokenizer.all_special_ids)
    last = {int(one.input_ids[np.flatnonzero(one.loss_mask)[-1] + 1]) for one in encoded}
    eos = {tokenizer.eos_token_id} - {None}
    return tuple(sorted((last & special) | eos))

"""Prepare domains: text to rows on disk, once, under a name that is a hash of all that decides it.

Training never sees a validation document.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock

from shared.config.adaptive_losses import reads_pairs
from shared.config.domains import Data, Domain, Source
from shared.config.run import Config
from shared.data.account import Account, listed
from shared.data.bar import with_bar
from shared.data.packing import Fit, Piece, chosen_rows, pack, pieces_of, unpacked
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import TRAIN, VALIDATION, Built, intact, publish, storage_errors
from shared.data.row_store import RaggedRows, RowStore
from shared.data.rows import SCHEMA
from shared.errors import DataError
from shared.images.reading import ImageRows
from shared.text.documents import Document, document_of
from shared.text.framing import FRAMING_VERSION, Encoded, Tokenizer, encode
from shared.text.framings import TaskFraming, framing_of
from shared.text.preferences import joined, read_pairs
from shared.text.sources import (
    LeftOut,
    MakeDocument,
    Split,
    digest_sources,
    num_bytes,
    read_documents,
    sources_of,
)

log = logging.getLogger(__name__)

HELD_OUT = 0.05  # of the documents, at most, where a domain names no validation text
# Defaults of options that came after the first corpora were named: only other values are in a name.
LATER_OPTIONS = {"special_tokens": "auto", "chat_template": None, "unfit": "refuse"}
FEWEST_DOCUMENTS = 20  # with fewer, pieces of documents are held out instead
FEWEST_VALIDATION_ROWS = 2  # of a domain whose weight is decided from them


def prepare(
    config: Config,
    *,
    tokenizer: Callable[[], Tokenizer],
    tokenizer_digest: str,
    cache: Path,
    left_out: Mapping[str, LeftOut] | None = None,
    images: ImageRows | None = None,
) -> tuple[PreparedDomain, ...]:
    """All domains of a run in config order, with natural weights: shares of all loss tokens.

    `tokenizer` is called where a domain is not in the cache. `left_out` has rows, by domain, that
    are counted and not read; with `images` rows may have some. Raises DataError for text that
    cannot be used, StorageError where the cache is full.
    """
    prepared = [
        prepare_domain(
            name,
            domain,
            data=config.data,
            root=Path(config.paths.root),
            cache=cache,
            tokenizer=tokenizer,
            tokenizer_digest=tokenizer_digest,
            left_out=(left_out or {}).get(name),
            classes=framing_of(config),
            pairs=reads_pairs(config.losses),
            images=images,
        )
        for name, domain in config.domains.items()
    ]
    for domain in prepared:
        if config.mixture.needs_validation:
            way_out = "take doremi, odm or fixed weights"
            what = f"mixture.policy {config.mixture.policy}"
            _refuse_thin_validation(domain, config.data, what=what, way_out=way_out)
        elif config.decides_from_validation:
            way_out = "set progressive.max_steps and progressive.plateau=null"
            what = "progressive.plateau"
            _refuse_thin_validation(domain, config.data, what=what, way_out=way_out)
        if config.progressive is not None:
            _refuse_empty_parts(domain, parts=config.progressive.phases)
    total = sum(domain.num_loss_tokens for domain in prepared)
    return tuple(replace(d, natural_weight=d.num_loss_tokens / total) for d in prepared)


def prepare_domain(
    name: str,
    domain: Domain,
    *,
    data: Data,
    root: Path,
    cache: Path,
    tokenizer: Callable[[], Tokenizer],
    tokenizer_digest: str,
    left_out: LeftOut | None = None,
    classes: TaskFraming | None = None,
    pairs: bool = False,
    images: ImageRows | None = None,
    progress: bool = True,
) -> PreparedDomain:
    """Tokenise one domain, or find it in the cache; safe with several processes at once. With
    `classes` its rows are texts and their classes, with `pairs` preferences, with `images` they
    may have some.

    `natural_weight` is the domain's own number of loss tokens, for `prepare` to divide.
    """
    domain = domain if images is None else images.of(domain)
    named = {"data": data, "root": root, "tokenizer_digest": tokenizer_digest, "images": images}
    digest = _digest(name, domain, left_out=left_out or {}, classes=classes, pairs=pairs, **named)
    rows = cache.expanduser().absolute() / "rows"
    folder = rows / digest
    with storage_errors(rows):
        rows.mkdir(parents=True, exist_ok=True)
    with FileLock(rows / f"{digest}.lock"):
        facts = found = intact(folder)
        if facts is None:
            out = left_out or {}
            told = (progress, out, classes, pairs, images)
            text = _Text(name, domain, data, root, tokenizer, *told)
            facts = publish(folder, domain=name, built=_build(text))
    log.info("%s: %s%s", name, facts.sentence(data), " (from the cache)" if found else "")
    return PreparedDomain(
        name=name,
        train_path=str(folder / TRAIN),
        validation_path=str(folder / VALIDATION),
        num_rows=facts.training.num_rows,
        num_loss_tokens=facts.training.num_loss_tokens,
        natural_weight=float(facts.training.num_loss_tokens),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    name: str
    domain: Domain
    data: Data
    root: Path
    tokenizer: Callable[[], Tokenizer]
    progress: bool
    left_out: LeftOut
    classes: TaskFraming | None
    pairs: bool
    images: ImageRows | None

    def pieces(self, split: Split, account: Account) -> list[Piece]:
        """Everything a split's sources hold, tokenised, cut to the context and counted."""
        sources = sources_of(self.domain, split)
        encoded = self._encoded(split, sources, account)
        size = num_bytes(sources, root=self.root)
        bar = with_bar(account.tally.over(encoded), name=self.name, size=size, shown=self.progress)
        context, too_long = self.data.context, self.data.too_long
        return list(pieces_of(bar, context=context, too_long=too_long, fit=account.fit))

    def rows(self, pieces: list[Piece]) -> RaggedRows:
        """Pieces as rows: packed, or each by itself where rows have classes, or images."""
        if self.classes is not None or self.images is not None:
            return unpacked(pieces)
        return pack(pieces, context=self.data.context)

    def _encoded(
        self, split: Split, sources: Sequence[Source], account: Account
    ) -> Iterator[Encoded]:
        data, tokenizer = self.data, self.tokenizer()
        if self.classes is not None:

            def count_cut() -> None:
                account.fit.too_long += 1

            return self.classes.encode(
                self.classes.read(self.domain, split, root=self.root, silent=account.silence),
                tokenizer=tokenizer,
                context=data.context,
                cut=count_cut if data.too_long in ("split", "cut") else None,
            )
        encoded = encode if self.images is None else self.images.encode
        framed = partial(
            encoded, tokenizer=tokenizer, loss_on=data.loss_on, special_tokens=data.special_tokens
        )
        if self.pairs:
            told = {"making": self._making, "silent": account.silence}
            return joined(framed(read_pairs(self.domain, split, root=self.root, **told)))
        return framed(self._kept(split, sources, account))

    def _making(self, make: MakeDocument) -> MakeDocument:
        return make if self.images is None else self.images.making(make)

    def _kept(
        self, split: Split, sources: Sequence[Source], account: Account
    ) -> Iterator[Document]:
        """The documents of a split that are not left out."""
        out = self.left_out.get(split, {})
        told = {"columns": self.domain.columns, "make": self._making(document_of)}
        read = {"root": self.root, "silent": account.silence}
        documents = read_documents(sources, **read, **told)
        for number, document in enumerate(documents):
            if number not in out:
                yield document
                continue
            account.leave_out(out[number])


def _build(text: _Text) -> Built:
    account, name, domain = Account(), text.name, text.domain
    pieces = text.pieces("train", account)
    if not pieces:
        raise DataError(
            f"domain {name} is empty: {_seen(account, text.data)}; check domains.{name}.train"
        )
    if domain.validation is None:
        training, validation, held_account = _split(pieces, text.data)
        dropped = 0
    else:
        held_account = Account()
        validation = text.pieces("validation", held_account)
        if not validation:
            raise DataError(
                f"the validation text of domain {name} is empty: {_seen(held_account, text.data)}; "
                f"check domains.{name}.validation, or leave it out to hold some training text out"
            )
        held_out = {piece.key for piece in validation}
        training = [piece for piece in pieces if piece.key not in held_out]
        dropped = len(pieces) - len(training)
    _refuse_too_little(name, training, domain)
    rows = text.rows(validation)
    num_rows = min(text.data.validation_rows, len(rows))
    spread = [(2 * i + 1) * len(rows) // (2 * num_rows) for i in range(num_rows)]
    packed = text.rows(training)
    return Built(packed, chosen_rows(rows, spread), account, held_account, dropped, len(rows))


def _split(pieces: list[Piece], data: Data) -> tuple[list[Piece], list[Piece], Account]:
    """Training pieces, those held out, and the account of these."""
    keyed = _keyed_for_holding_out(pieces)
    held_out = _held_out(keyed, data)
    both = zip(pieces, keyed, strict=True)
    documents = [piece for piece, one in both if one.key in held_out]
    parts = {piece.key for piece in documents if not piece.whole}
    fit = Fit(documents=len({piece.key for piece in documents}), too_long=len(parts))
    validation = _unique([piece for piece in keyed if piece.key in held_out])
    return [piece for piece in keyed if piece.key not in held_out], validation, Account(fit)


def _seen(account: Account, data: Data) -> str:
    """What a text without a token to learn holds."""
    roles, fit, documents = account.tally.roles, account.fit, account.fit.documents
    if fit.beyond_context:
        way_out = "raise data.context" + (
            " or set data.too_long=split" if data.too_long == "cut" else ""
        )
        return (
            f"{documents:,} documents, of {fit.beyond_context:,} of which what is learnt begins "
            f"beyond data.context {data.context:,} (data.too_long={data.too_long}); {way_out}"
        )
    if data.too_long == "drop" and fit.too_long:
        return (
            f"{documents:,} documents, of which {fit.too_long:,} are longer than data.context "
            f"{data.context:,} and dropped (data.too_long=drop); raise it, or set "
            "data.too_long=split"
        )
    if account.tally.unfit:
        return f"{documents:,} documents; data.unfit drops: {listed(account.tally.unfit)}"
    told = f" (roles: {listed(roles)}; the assistant's messages are learnt)" if roles else ""
    if account.tally.not_learnt:
        told += f" ({account.tally.not_learnt:,} say so themselves, as by weight: 0)"
    return f"{documents:,} documents, none with a token to learn{told}"


def _refuse_too_little(name: str, training: list[Piece], domain: Domain) -> None:
    if not training:
        way_out = "name validation text" if domain.validation is None else "take other text"
        raise DataError(
            f"domain {name} has no training text left beside its validation text; add text "
            f"to it, or {way_out} under domains.{name}"
        )


def _refuse_thin_validation(domain: PreparedDomain, data: Data, *, what: str, way_out: str) -> None:
    """One row says too little to move weights by, or to end a phase."""
    validation = RowStore.open(domain.validation_path)
    if len(validation) < FEWEST_VALIDATION_ROWS or not validation.num_loss_tokens:
        more = f"name more text under domains.{domain.name}.validation"
        if data.validation_rows < FEWEST_VALIDATION_ROWS:
            more = f"set data.validation_rows={FEWEST_VALIDATION_ROWS} or more"
        rows = "row" if len(validation) == 1 else "rows"
        raise DataError(
            f"domain {domain.name} has {len(validation)} validation {rows} with "
            f"{validation.num_loss_tokens} tokens to learn, too little for {what}, "
            f"which needs {FEWEST_VALIDATION_ROWS} rows; {more}, or {way_out}"
        )


def _refuse_empty_parts(domain: PreparedDomain, *, parts: int) -> None:
    """Every phase draws a row of its own at least."""
    if domain.num_rows < parts:
        raise DataError(
            f"domain {domain.name} has {domain.num_rows} training rows, too few for "
            f"progressive.phases {parts}, each of which draws rows of its own; give it more text, "
            "lower data.context, or lower progressive.phases"
        )


def _keyed_for_holding_out(pieces: list[Piece]) -> list[Piece]:
    """With few documents, such as one book, every piece stands for itself; pairs never do."""
    few = len({piece.key for piece in pieces}) < FEWEST_DOCUMENTS
    if not few or any(piece.second for piece in pieces):
        return pieces
    return [replace(piece, key=_content_key(piece)) for piece in pieces]


def _held_out(pieces: list[Piece], data: Data) -> set[int]:
    """Keys of held out text: the smallest hashes, until the validation rows are full, at least
    one and at most a twentieth. A hash of the content moves with no other document."""
    lengths: dict[int, int] = {}
    for piece in pieces:
        lengths[piece.key] = lengths.get(piece.key, 0) + len(piece.input_ids)
    most = max(1, int(HELD_OUT * len(lengths)))
    held_out: set[int] = set()
    tokens = 0
    for key in sorted(lengths)[:most]:
        if held_out and tokens >= data.validation_rows * data.context:
            break
        held_out.add(key)
        tokens += lengths[key]
    return held_out


def _unique(pieces: list[Piece]) -> list[Piece]:
    """Pieces of repeated documents once."""
    seen: dict[int, Piece] = {}
    for piece in pieces:
        seen.setdefault(_content_key(piece), piece)
    return list(seen.values())


def _content_key(piece: Piece) -> int:
    """A hash of what a piece holds, its images among it."""
    state = xxhash.xxh3_64(np.ascontiguousarray(piece.input_ids).tobytes())
    for image in piece.images:
        state.update(image.digest.encode())
    return state.intdigest()


def _digest(
    name: str,
    domain: Domain,
    *,
    data: Data,
    root: Path,
    tokenizer_digest: str,
    left_out: LeftOut,
    classes: TaskFraming | None,
    pairs: bool,
    images: ImageRows | None,
) -> str:
    decides = {
        "framing": FRAMING_VERSION,
        "schema": str(SCHEMA),
        "name": name,
        "train": digest_sources(sources_of(domain, "train"), root=root),
        "validation": digest_sources(sources_of(domain, "validation"), root=root),
        "columns": dict(domain.columns),
        "data": {
            name: value
            for name, value in data.model_dump().items()
            if name not in LATER_OPTIONS or value != LATER_OPTIONS[name]
        },
        "tokenizer": tokenizer_digest,
    }
    if any(left_out.values()):
        decides["left_out"] = left_out
    if classes is not None:
        decides["classes"] = classes.identity
    if pairs:
        decides["pairs"] = "by prompt"
    if images is not None:
        decides["images"] = images.identity(domain)
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())

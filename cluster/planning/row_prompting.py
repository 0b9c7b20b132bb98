"""What the teacher is shown with each row of a domain, from a column of its sources."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock

from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data.row_cache import makers, storage_errors
from shared.errors import ConfigError, DataError
from shared.prompts.prefix import Opening, opening
from shared.prompts.prompts import Prompt
from shared.prompts.row_prompts import (
    RowOpenings,
    RowPrompt,
    read_row_prompts,
    write_row_prompts,
)
from shared.text.documents import Document
from shared.text.framing import Encoded, encode
from shared.text.sources import digest_sources, read_documents, sources_of

if TYPE_CHECKING:
    from cluster.planning.handshake import Handshake

FOLDER = "row_prompts"
DOCUMENTS_PER_CALL = 512
NOTHING = Opening(np.zeros(0, np.int32), np.zeros(0, np.int32))
SPLITS = ("split", "split_with_prompt")


def row_openings_of(name: str, domain: Domain, config: Config, hands: "Handshake") -> RowOpenings:
    """The openings of a domain with `columns.teacher_prompt`, from the cache or built.

    Raises ConfigError for an option that leaves a document without its prompt, DataError for a row
    that cannot have one, StorageError where the cache is full.
    """
    if config.data.loss_on == "everything":
        raise ConfigError(
            f"data.loss_on is everything, so domain {name} would learn its prompts, before which "
            f"the teacher is shown domains.{name}.columns.teacher_prompt; set "
            "data.loss_on=responses"
        )
    digest = _digest(domain, config, hands)
    folder = Path(config.paths.cache).expanduser().absolute() / FOLDER
    path = folder / f"{digest}.arrow"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{digest}.lock"):
            try:
                return read_row_prompts(path)
            except (OSError, pa.ArrowException):
                prompts = list(_prompts(name, domain, config, hands.load_tokenizer()))
                write_row_prompts(path, prompts)
            return read_row_prompts(path)


def _digest(domain: Domain, config: Config, hands: "Handshake") -> str:
    root = Path(config.paths.root)
    splits = (sources_of(domain, "train"), sources_of(domain, "validation"))
    decides = {
        "sources": [digest_sources(sources, root=root) for sources in splits],
        "columns": dict(domain.columns),
        "data": config.data.model_dump(),
        "tokenizer": hands.rows_digest,
        "made_by": makers(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _prompts(name: str, domain: Domain, config: Config, tokenizer: Any) -> Iterator[RowPrompt]:
    column, any_shown = domain.columns["teacher_prompt"], False
    sources = [*sources_of(domain, "train"), *sources_of(domain, "validation")]
    documents = read_documents(sources, root=Path(config.paths.root), columns=domain.columns)
    while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
        found = encode(
            iter(batch),
            tokenizer=tokenizer,
            loss_on=config.data.loss_on,
            special_tokens=config.data.special_tokens,
        )
        for document, encoded in zip(batch, found, strict=True):
            if not encoded.loss_mask.any():
                continue  # no row holds it
            any_shown |= bool(document.teacher_prompt)
            _refuse_unfit(document, encoded, config.data)
            if encoded.loss_mask[: config.data.context - 1].any():
                yield _prompt(document, encoded, tokenizer, context=config.data.context)
    if not any_shown:
        raise DataError(
            f"domains.{name}.columns.teacher_prompt is {column}, but no row of the domain has "
            "anything there; name another column, or leave it out"
        )


def _prompt(document: Document, encoded: Encoded, tokenizer: Any, *, context: int) -> RowPrompt:
    """What is shown with a document; one that begins otherwise than its kind does, as with a system
    message of its own, keeps its beginning after it."""
    ids, instead = encoded.input_ids, NOTHING
    if document.teacher_prompt:
        instead = opening(Prompt(document.teacher_prompt), tokenizer, document.kind)
        if not np.array_equal(ids[: len(instead.plain_ids)], instead.plain_ids):
            instead = Opening(NOTHING.plain_ids, instead.shown_ids)
    stop = int(np.argmax(encoded.loss_mask)) + 1
    return RowPrompt(document.where, instead, ids[:stop], min(context, len(ids)))


def _refuse_unfit(document: Document, encoded: Encoded, data: Data) -> None:
    """A document is known by its prompt, and has one answer, in one piece."""
    where, way_out = document.where, "leave the row, or columns.teacher_prompt, out"
    if document.kind == "text":
        raise DataError(
            f"{where} is text without a prompt, before whose answer a teacher_prompt could be "
            f"shown; {way_out}"
        )
    learnt = np.flatnonzero(encoded.loss_mask)
    if (np.diff(learnt) > 1).any():
        raise DataError(
            f"{where} is a conversation of which several answers are learnt, and a teacher_prompt "
            f"is shown for one; learn its last alone (weight: 0 for the others), or {way_out}"
        )
    if len(encoded.input_ids) > data.context and data.too_long in SPLITS:
        raise DataError(
            f"{where} has {len(encoded.input_ids):,} tokens, more than data.context "
            f"{data.context:,}, and would be split, so that its teacher_prompt stood before a part "
            "of it; raise the context, or set data.too_long to cut"
        )

"""What the teacher is shown with each row of a domain, from a column of its sources."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data.row_cache import makers, storage_errors
from shared.errors import ConfigError, DataError
from shared.locking import alone
from shared.prompts.prefix import Opening, opening
from shared.prompts.prompts import Prompt
from shared.prompts.row_prompts import (
    BEYOND_TEACHER,
    RowOpenings,
    RowPrompt,
    Splits,
    read_left_out,
    read_row_prompts,
    write_row_prompts,
)
from shared.text.documents import Document
from shared.text.framing import Encoded, encode
from shared.text.sources import LeftOut, Split, digest_sources, read_documents, sources_of

if TYPE_CHECKING:
    from cluster.planning.handshake import Handshake

FOLDER = "row_prompts"
DOCUMENTS_PER_CALL = 512
NOTHING = Opening(np.zeros(0, np.int32), np.zeros(0, np.int32))
SPLITTING = ("split", "split_with_prompt")
SPLITS_READ: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class ByRow:
    """What the teacher is shown with the rows of a domain, and the rows that are left out."""

    openings: RowOpenings
    left_out: LeftOut


def by_row_of(
    name: str, domain: Domain, config: Config, hands: "Handshake", *, prompt: Prompt
) -> ByRow:
    """The openings of a domain with `columns.teacher_prompt`, each after the domain's own `prompt`,
    from the cache or built.

    Raises ConfigError for an option that leaves a document without its prompt, DataError for a row
    that cannot have one where `data.unfit` does not drop it, StorageError where the cache is full.
    """
    if config.data.loss_on == "everything":
        raise ConfigError(
            f"data.loss_on is everything, so domain {name} would learn its prompts, before which "
            f"the teacher is shown domains.{name}.columns.teacher_prompt; set "
            "data.loss_on=responses"
        )
    rows = _Rows(name, domain, config, prompt, _least_context(name, config, hands))
    digest = _digest(rows, hands)
    folder = Path(config.paths.cache).expanduser().absolute() / FOLDER
    path = folder / f"{digest}.arrow"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f"{digest}.lock", making=f"the teacher's prompts of {name}"):
            try:
                return ByRow(read_row_prompts(path), read_left_out(path))
            except (OSError, pa.ArrowException):
                prompts = list(rows.prompts(hands.load_tokenizer()))
                write_row_prompts(path, prompts, rows.left_out if rows.drops else None)
            return ByRow(read_row_prompts(path), read_left_out(path))


def _least_context(name: str, config: Config, hands: "Handshake") -> int | None:
    """Tokens that every teacher of a domain reads; None where there is no limit."""
    known = (hands.teachers[teacher].context for teacher in config.teachers_of(name))
    return min((limit for limit in known if limit is not None), default=None)


def _digest(rows: "_Rows", hands: "Handshake") -> str:
    root, data = Path(rows.config.paths.root), rows.config.data
    splits = (sources_of(rows.domain, "train"), sources_of(rows.domain, "validation"))
    decides = {
        "sources": [digest_sources(sources, root=root) for sources in splits],
        "columns": dict(rows.domain.columns),
        "data": data.model_dump(),
        "tokenizer": hands.rows_digest,
        "made_by": makers(),
        "prompt": rows.prompt.id,
        "room": [rows.teacher_context, rows.written] if rows.drops else None,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a domain."""

    name: str
    domain: Domain
    config: Config
    prompt: Prompt  # of the domain
    teacher_context: int | None
    left_out: Splits = field(default_factory=dict)

    @property
    def drops(self) -> bool:
        return self.config.data.unfit == "drop"

    @property
    def written(self) -> int:
        """Tokens that a model writes after a prompt at most."""
        source = self.config.source
        return 0 if source.is_dataset else source.max_new_tokens

    def prompts(self, tokenizer: Any) -> Iterator[RowPrompt]:
        """What is shown with each row; those with which nothing can be are put into `left_out`."""
        column, any_shown = self.domain.columns["teacher_prompt"], False
        for split in SPLITS_READ:
            for number, (document, encoded) in enumerate(self._encoded(split, tokenizer)):
                if not encoded.loss_mask.any():
                    continue  # no row holds it
                any_shown |= bool(document.teacher_prompt)
                found = self._prompt_of(document, encoded, tokenizer)
                if isinstance(found, str):
                    self.left_out.setdefault(split, {})[number] = found
                elif found is not None:
                    yield replace(found, place=(split, number))
        if not any_shown:
            raise DataError(
                f"domains.{self.name}.columns.teacher_prompt is {column}, but no row of the domain "
                "has anything there; name another column, or leave it out"
            )

    def _encoded(self, split: Split, tokenizer: Any) -> Iterator[tuple[Document, Encoded]]:
        sources, root = sources_of(self.domain, split), Path(self.config.paths.root)
        documents = read_documents(sources, root=root, columns=self.domain.columns)
        data = self.config.data
        while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
            found = encode(
                iter(batch),
                tokenizer=tokenizer,
                loss_on=data.loss_on,
                special_tokens=data.special_tokens,
            )
            yield from zip(batch, found, strict=True)

    def _prompt_of(
        self, document: Document, encoded: Encoded, tokenizer: Any
    ) -> RowPrompt | str | None:
        """What is shown with a document, the reason why nothing can be, or None where no row holds
        it. Raises DataError where such a row is not to be dropped."""
        data = self.config.data
        if len(encoded.input_ids) > data.context and data.too_long == "drop":
            return None
        unfit = _unfit(document, encoded, data)
        if unfit is not None and not self.drops:
            raise DataError(f"{document.where} {unfit[1]}, or set data.unfit=drop")
        if unfit is not None:
            return unfit[0]
        if not encoded.loss_mask[: data.context - 1].any():
            return None
        found = self._shown(document, encoded, tokenizer)
        needed = found.needs(context=data.context, written=self.written)
        is_beyond = self.teacher_context is not None and needed > self.teacher_context
        return BEYOND_TEACHER if self.drops and is_beyond else found

    def _shown(self, document: Document, encoded: Encoded, tokenizer: Any) -> RowPrompt:
        """What is shown with a document; one that begins otherwise than its kind does, as with a
        system message of its own, keeps its beginning after it."""
        ids, instead = encoded.input_ids, NOTHING
        told = (self.prompt.instruction, document.teacher_prompt)
        prompt = replace(self.prompt, instruction="\n\n".join(filter(None, told)))
        if prompt:
            instead = opening(prompt, tokenizer, document.kind)
            if not np.array_equal(ids[: len(instead.plain_ids)], instead.plain_ids):
                instead = Opening(NOTHING.plain_ids, instead.shown_ids)
        stop = int(np.argmax(encoded.loss_mask)) + 1
        length = min(self.config.data.context, len(ids))
        return RowPrompt(document.where, instead, ids[:stop], length)


def _unfit(document: Document, encoded: Encoded, data: Data) -> tuple[str, str] | None:
    """Why nothing can be shown before a document, in a word and in a sentence: it is known by its
    prompt, and has one answer, in one piece."""
    way_out = "leave the row, or columns.teacher_prompt, out"
    if document.kind == "text":
        return (
            "text without a prompt",
            "is text without a prompt, before whose answer a teacher_prompt could be shown; "
            f"{way_out}",
        )
    if (np.diff(np.flatnonzero(encoded.loss_mask)) > 1).any():
        return (
            "several answers",
            "is a conversation of which several answers are learnt, and a teacher_prompt is shown "
            f"for one; learn its last alone (weight: 0 for the others), {way_out}",
        )
    if len(encoded.input_ids) > data.context and data.too_long in SPLITTING:
        return (
            "longer than data.context",
            f"has {len(encoded.input_ids):,} tokens, more than data.context {data.context:,}, and "
            "would be split, so that its teacher_prompt stood before a part of it; raise the "
            "context, set data.too_long to cut or drop",
        )
    return None

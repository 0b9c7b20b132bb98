"""Rows of a text and its class, as documents and as token ids.

A row is `{"text", "label"}` or `{"prompt", "response"}`, or has the columns that the domain names.
As a document its text is the prompt and its class the response. As token ids it is the text as the
tokenizer frames it, and the number of the class in the place of a next token, so that what a row
teaches is what its last position but one predicts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shared.config.domains import Domain
from shared.errors import DataError
from shared.text.documents import Columns, Document, Field
from shared.text.formats import as_string
from shared.text.framing import DOCUMENTS_PER_CALL, Encoded, Remarks, Tokenizer, content_key
from shared.text.masks import row_is_learnt
from shared.text.sources import Silent, Split, nothing, read_documents, sources_of

TEXT: tuple[Field, ...] = ("text", "prompt")
LABEL: tuple[Field, ...] = ("label", "response")


def read_classified(
    domain: Domain, split: Split, *, root: Path, silent: Silent = nothing
) -> Iterator[Document]:
    """The rows of a split of a domain; see `read_documents`. Raises DataError for one without a
    text or a label."""
    told = {"columns": domain.columns, "make": classified_of, "silent": silent}
    return read_documents(sources_of(domain, split), root=root, **told)


def text_in(row: Mapping[str, object], where: str, columns: Columns) -> str:
    """The text of a row. Raises DataError for one without words."""
    text = field_of(row, where, columns, TEXT)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: its text is {text!r:.40}, no words; leave the row out")
    return as_string(text, where, "its text")


def classified_of(row: object, where: str, columns: Columns) -> Document:
    """A row as a document. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is no object with a text and a label; correct the row")
    text = text_in(row, where, columns)
    label = field_of(row, where, columns, LABEL)
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    label = label.strip() if isinstance(label, str) else label
    if not isinstance(label, str) or not label:
        raise DataError(
            f"{where}: its label is {label!r:.40}, the name of no class; name one, or leave the "
            "row out"
        )
    label = as_string(label, where, "its label")
    return read_of(Document("pair", where, prompt=text, response=label), row, columns, LABEL)


def read_of(
    document: Document, row: Mapping[str, Any], columns: Columns, answer: Sequence[Field]
) -> Document:
    """A row's document with the fields that are not read."""
    read = [_name_of(row, columns, names) for names in (TEXT, answer)]
    others = (name for name in row if name not in read)
    unread = (str(name) for name in others if row_is_learnt(name, row[name]) is None)
    return replace(document, unread=tuple(unread))


def field_of(row: Mapping[str, Any], where: str, columns: Columns, names: Sequence[Field]) -> Any:
    """The value of the first of our fields that a row has; that of a named column alone."""
    if (found := _name_of(row, columns, names)) is not None:
        return row[found]
    ours, asked = names[0], _names_asked(columns, names)
    if nulls := [name for name in asked if name in row]:
        raise DataError(f"{where}: {' and '.join(nulls)} is null; write it, or leave the row out")
    has = ", ".join(f"{name!s:.40}" for name in row) or "nothing"
    raise DataError(
        f"{where} has no {' and no '.join(asked)}, it has {has}; name its {ours} under the "
        "domain's `columns`, or leave the row out"
    )


def _name_of(row: Mapping[str, Any], columns: Columns, names: Sequence[Field]) -> str | None:
    asked = _names_asked(columns, names)
    return next((name for name in asked if row.get(name) is not None), None)


def _names_asked(columns: Columns, names: Sequence[Field]) -> Sequence[str]:
    return (columns[names[0]],) if names[0] in columns else names


def labels_in(domains: Mapping[str, Domain], *, root: Path) -> dict[str, str]:
    """The classes of the training rows of all domains, each with the first row that has it."""
    found: dict[str, str] = {}
    for domain in domains.values():
        for document in read_classified(domain, "train", root=root):
            found.setdefault(document.response, document.where)
    return found


@dataclass(frozen=True, slots=True)
class ClassFraming:
    """How rows of a run's classes become token ids."""

    labels: tuple[str, ...]

    @property
    def identity(self) -> Any:
        """What decides rows beside their text."""
        return self.labels

    def read(
        self, domain: Domain, split: Split, *, root: Path, silent: Silent = nothing
    ) -> Iterator[Document]:
        """See `read_classified`."""
        return read_classified(domain, split, root=root, silent=silent)

    def encode(
        self,
        documents: Iterable[Document],
        *,
        tokenizer: Tokenizer,
        context: int,
        cut: Callable[[], None] | None,
    ) -> Iterator[Encoded]:
        """Token ids and loss masks in order. With `cut`, a text loses what is beyond `context`,
        which counts the class too, and each is told to it. Raises DataError for a class that is
        not known."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        waiting = iter(documents)
        while batch := list(islice(waiting, DOCUMENTS_PER_CALL)):
            found = _ids(batch, tokenizer)
            if cut is not None:
                long = [n for n, ids in enumerate(found) if len(ids) >= context]
                shorter = _ids([batch[n] for n in long], tokenizer, most=context - 1)
                for n, ids in zip(long, shorter, strict=True):
                    found[n] = ids
                    cut()
            for document, ids in zip(batch, found, strict=True):
                if document.response not in numbers:
                    raise DataError(
                        f"{document.where} has the label {document.response!r}, which is not among "
                        "task.labels or those of the training rows; correct it, or leave it out"
                    )
                yield _encoded(document, ids, numbers[document.response])


def _ids(
    batch: Sequence[Document], tokenizer: Tokenizer, *, most: int | None = None
) -> list[list[int]]:
    """Token ids of texts as the tokenizer frames them, `most` of each where that is said."""
    if not batch:
        return []
    shortened = {} if most is None else {"truncation": True, "max_length": most}
    texts = [document.prompt for document in batch]
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, **options, **shortened)["input_ids"]


def _encoded(document: Document, ids: list[int], number: int) -> Encoded:
    """Raises DataError for a text of no token."""
    if not ids:
        raise DataError(f"{document.where}: its text has no token; leave the row out")
    mask = np.zeros(len(ids) + 1, np.uint8)
    mask[-2] = 1
    return Encoded(
        key=content_key(document),
        where=document.where,
        input_ids=np.array([*ids, number], np.int32),
        loss_mask=mask,
        num_chars=len(document.prompt),
        remarks=Remarks(kind="pair", unread=document.unread),
    )

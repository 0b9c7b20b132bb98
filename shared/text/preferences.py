"""Rows of preferences: a prompt, the response that is chosen and one that is rejected.

As token ids a row is two documents, the prompt with the chosen and the prompt with the rejected
response, one after the other, and never apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from shared.config.domains import Domain
from shared.errors import DataError
from shared.text.documents import CONVERSATIONS, Columns, Document, document_of
from shared.text.framing import Encoded
from shared.text.sources import MakeDocument, Silent, Split, nothing, read_documents, sources_of

Answer = Literal["chosen", "rejected"]


def read_pairs(
    domain: Domain,
    split: Split,
    *,
    root: Path,
    making: Callable[[MakeDocument], MakeDocument] = lambda make: make,
    silent: Silent = nothing,
) -> Iterator[Document]:
    """The rows of a split, each as its chosen and then its rejected document, as `making` has what
    makes them; see `read_documents`. Raises DataError for a row without one of the fields, or whose
    responses are the same."""
    sources = sources_of(domain, split)
    answers: tuple[tuple[Answer, Silent], ...] = (("chosen", silent), ("rejected", nothing))
    both = (
        read_documents(
            sources,
            root=root,
            columns=domain.columns,
            make=making(partial(_answered, answer=answer)),
            silent=told,
        )
        for answer, told in answers
    )
    return chain.from_iterable(zip(*both, strict=True))


def read_chosen(domain: Domain, split: Split, *, root: Path) -> Iterator[Document]:
    """The rows of a split with their chosen responses alone. Raises DataError as `read_pairs`."""
    return islice(read_pairs(domain, split, root=root), 0, None, 2)


def joined(documents: Iterable[Encoded]) -> Iterator[Encoded]:
    """Chosen and rejected documents as one, whose second begins at `second`. Its key is of both,
    and those of one prompt are held out together."""
    waiting = iter(documents)
    for chosen, rejected in zip(waiting, waiting, strict=True):
        yield replace(
            chosen,
            key=_hash(chosen.key.to_bytes(8, "little") + rejected.key.to_bytes(8, "little")),
            family=_hash(_prompt_of(chosen)),
            input_ids=np.concatenate([chosen.input_ids, rejected.input_ids]),
            loss_mask=np.concatenate([chosen.loss_mask, rejected.loss_mask]),
            num_chars=chosen.num_chars + rejected.num_chars,
            second=len(chosen.input_ids),
        )


def _prompt_of(document: Encoded) -> bytes:
    """Its images, and its tokens up to the first that is learnt."""
    learnt = np.flatnonzero(document.loss_mask)
    stop = int(learnt[0]) + 1 if len(learnt) else len(document.input_ids)
    images = "".join(image.digest for image in document.images).encode()
    return images + np.ascontiguousarray(document.input_ids[:stop], np.int32).tobytes()


def _hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)


def _answered(row: object, where: str, columns: Columns, *, answer: Answer) -> Document:
    """A row with one of its responses, as a prompt and its response. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is no object with prompt, chosen and rejected; correct the row")
    names = {field: columns.get(field, field) for field in ("prompt", "chosen", "rejected")}
    missing = [name for name in names.values() if row.get(name) is None]
    if missing:
        raise DataError(
            f"{where} has no {' and no '.join(missing)}, and a preference loss learns prompts with "
            "a chosen and a rejected response; write them, name them under the domain's "
            "`columns`, or leave the row out"
        )
    found = {field: row[name] for field, name in names.items()}
    if found["chosen"] == found["rejected"]:
        raise DataError(
            f"{where}: chosen and rejected are the same, so neither is preferred; leave the row out"
        )
    others = {name: value for name, value in row.items() if name not in names.values()}
    spare = [name for name in ("messages", *CONVERSATIONS, "text") if others.pop(name, None)]
    told: dict[str, Any] = {"prompt": found["prompt"], "response": found[answer]}
    beside = ("input", "system", "tools", "history")
    kept: Columns = {ours: name for ours, name in columns.items() if ours in beside}
    document = document_of(others | told, where, kept, learns_history=False)
    return replace(document, unread=(*document.unread, *spare))

"""Rows with images: read from their sources, and from documents to token ids.

A row has `images` beside its text: paths, relative to its file or to `paths.root`, or the encoded
bytes themselves. `<image>` in a prompt, or in what a user says, is the place of one, in their
order; where a row has no such place, its images stand before its text, and a line break.

T tokens of a document
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.config.domains import Domain
from shared.errors import DataError
from shared.images.processor import ImageProcessor, open_image
from shared.images.row_image import RowImage
from shared.text.documents import Columns, Document
from shared.text.framing import Encoded, encode
from shared.text.sources import MakeDocument, Split, read_documents, sources_of

PLACE = "<image>"
COLUMN = "images"
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class ImageRows:
    """How rows are read that may have images."""

    processor: ImageProcessor  # of the student
    root: Path  # of relative paths

    def of(self, domain: Domain) -> Domain:
        """A domain with its column of images, which has its own name by default."""
        return domain.model_copy(update={"columns": {COLUMN: COLUMN, **domain.columns}})

    def making(self, make: MakeDocument) -> MakeDocument:
        """`make` for such rows."""
        return partial(_seen, make=make, root=self.root, token=self.processor.token)

    def encode(
        self, documents: Iterator[Document], *, tokenizer: Any, **told: Any
    ) -> Iterator[Encoded]:
        """See `shared.text.framing.encode`. Raises DataError for an image that cannot be read."""
        seeing: Any = ImageTokenizer(tokenizer, self.processor.token)
        for document in encode(documents, tokenizer=seeing, **told):
            yield _expanded(document, self.processor)

    def identity(self, domain: Domain) -> list[Any]:
        """What decides the rows of a domain beside its sources and the tokenizer: the processor,
        and the files of images by size and time."""
        stamps = []
        for split in SPLITS:
            told = {"columns": domain.columns, "make": self.making(_bearer)}
            for document in read_documents(sources_of(domain, split), root=self.root, **told):
                stamps += [image.stamp() for image in document.images]
        return [self.processor.digest, stamps]


def _bearer(row: object, where: str, columns: Columns) -> Document:
    """A document of a row's images alone."""
    return Document("text", where)


def _seen(
    row: object, where: str, columns: Columns, *, make: MakeDocument, root: Path, token: str
) -> Document:
    """A row as a document with its images in their places. Raises DataError."""
    name = columns.get(COLUMN, COLUMN)
    others: Columns = {ours: own for ours, own in columns.items() if ours != COLUMN}
    if not isinstance(row, Mapping):
        return make(row, where, others)
    file = Path(where.rpartition(":")[0])
    folder = file.parent if file.is_file() else root  # rows of data sets have no file
    found = row.get(name)
    listed = found if isinstance(found, list | tuple) else [] if found is None else [found]
    images = tuple(_image(one, where, (folder, root)) for one in listed)
    document = make({key: value for key, value in row.items() if key != name}, where, others)
    return replace(_placed(document, len(images), token), images=images)


def _image(value: Any, where: str, folders: Sequence[Path]) -> RowImage:
    """One image of a row: bytes, a path, or both as data sets of Hugging Face have them."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return RowImage(value, where)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: an image is {value!r:.40}, neither a path nor encoded bytes; correct the row"
        )
    for folder in folders:
        with suppress(OSError, ValueError):  # of what is no path, or may not be looked at
            path = (folder / value).resolve()
            if path.is_file() and any(path.is_relative_to(base.resolve()) for base in folders):
                return RowImage(path, where)
    raise DataError(
        f"{where}: its image {value!r:.80} is no file below {folders[0]}, the folder of the row's "
        f"file, nor below paths.root {folders[1]}; correct the path, or leave the row out"
    )


def _placed(document: Document, count: int, token: str) -> Document:
    """A document in which a model's own token holds the place of each image. Raises DataError
    where it has other than `count` places."""
    found = replace(
        document,
        text=document.text.replace(PLACE, token),
        prompt=document.prompt.replace(PLACE, token),
        messages=tuple(
            replace(one, content=one.content.replace(PLACE, token))
            if one.role != "assistant"
            else one
            for one in document.messages
        ),
    )
    texts = (found.text, found.prompt, *(one.content for one in found.messages))
    places = sum(text.count(token) for text in texts)
    if not places and count:
        return _before(found, token * count + "\n")
    if places != count:
        raise DataError(
            f"{document.where} has {count} images and {places} places ({PLACE}) for them; write "
            "one for each, or none"
        )
    return found


def _before(document: Document, opening: str) -> Document:
    """A document with something before its text, or before what a user says first."""
    if document.kind == "text":
        return replace(document, text=opening + document.text)
    if document.kind == "pair":
        return replace(document, prompt=opening + document.prompt)
    messages = list(document.messages)
    at = next((n for n, one in enumerate(messages) if one.role == "user"), 0)
    messages[at] = replace(messages[at], content=opening + messages[at].content)
    return replace(document, messages=tuple(messages))


@dataclass(frozen=True)
class ImageTokenizer:
    """A tokenizer under which the place of an image is one token, whatever `data.special_tokens`
    says, and a chat template is told of images as parts of what is said; a `Tokenizer`."""

    tokenizer: Any
    token: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: list[str], **options: Any) -> Any:
        """See `Tokenizer`."""
        return self.tokenizer(text, **options)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """All but the place of an image."""
        added = self.tokenizer.added_tokens_decoder
        return {index: one for index, one in added.items() if one.content != self.token}

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """See `Tokenizer`."""
        parts = [turn | {"content": self._parts(turn["content"])} for turn in conversation]
        return self.tokenizer.apply_chat_template(parts, **options)

    def _parts(self, content: Any) -> Any:
        if not isinstance(content, str):
            return content
        texts = content.split(self.token)
        parts: list[dict[str, str]] = [{"type": "image"}] * (2 * len(texts) - 1)
        parts[::2] = [{"type": "text", "text": text} for text in texts]
        return [part for part in parts if part.get("text", PLACE) or len(parts) == 1]


def _expanded(document: Encoded, processor: ImageProcessor) -> Encoded:
    """A document with the tokens of its images in the place of each."""
    is_place_T = document.input_ids == processor.token_id
    if int(is_place_T.sum()) != len(document.images):
        raise DataError(
            f"{document.where} has {len(document.images)} images, and its text as the model reads "
            f"it {int(is_place_T.sum())} places for them; write {PLACE} once for each, in what is "
            "asked alone"
        )
    if not document.images:
        return document
    parts = [processor.ids(open_image(one.read(), where=_named(one))) for one in document.images]
    size_T = np.ones(len(is_place_T), np.int64)
    size_T[is_place_T] = [len(part) for part in parts]
    ids = np.repeat(document.input_ids, size_T)
    is_image = np.repeat(is_place_T, size_T)
    ids[is_image] = np.concatenate(parts)
    mask = np.zeros(len(ids), np.uint8)
    mask[np.cumsum(size_T) - 1] = document.loss_mask  # what an image's last token says is the text
    mask[:-1][is_image[1:]] = 0
    opening = int(size_T[: document.opening].sum())
    return replace(document, input_ids=ids, loss_mask=mask, opening=opening)


def _named(image: RowImage) -> str:
    """The row of an image, and its file where it has one."""
    return image.where if isinstance(image.source, bytes) else f"{image.where}, {image.source}"

"""From documents to token ids, and which of them are learnt.

Text is framed as bos, text, eos. A prompt and its response are joined by a newline and framed the
same way, unless the tokenizer has a chat template: then they are a user's and an assistant's turn.
A whole document is tokenised at once, and its learnt tokens are found by character offsets, so
that ids are those of the plain text whatever merges cross a border.

T tokens of a document
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from jinja2 import TemplateError

from shared.data.sources import Document
from shared.errors import DataError

FRAMING_VERSION = 1
DOCUMENTS_PER_CALL = 512
Span = tuple[int, int]  # characters [start, stop)
LossOn = Literal["responses", "everything"]


class Tokenizer(Protocol):
    """What is asked of a fast tokenizer; transformers' ones fit."""

    chat_template: Any
    name_or_path: str

    @property
    def bos_token_id(self) -> int | None:
        """Opens a document."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Ends a document."""
        ...

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Ids and character offsets of each text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """A conversation as text."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as token ids."""

    key: int  # hash of the content: equal documents have equal keys
    where: str
    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # uint8 [T]; 1 where position t is trained to predict token t+1
    num_chars: int


@dataclass(frozen=True, slots=True)
class _Framed:
    document: Document
    text: str
    learnt: tuple[Span, ...] | None  # None: every token
    bare: bool  # bos and eos are still to be added


def encode(
    documents: Iterator[Document], *, tokenizer: Tokenizer, loss_on: LossOn
) -> Iterator[Encoded]:
    """Token ids and loss masks of documents, tokenised in batches, in order.

    Raises DataError for conversations without a chat template, and for conversations whose
    template does not let the assistant's turns be found.
    """
    if not getattr(tokenizer, "is_fast", True):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no fast form (tokenizer.json); "
            "convert it with transformers first"
        )
    while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
        framed = [_framed(document, tokenizer, loss_on) for document in batch]
        yield from _tokenised(framed, tokenizer)


def content_key(document: Document) -> int:
    """64-bit hash of a document's content."""
    state = xxhash.xxh3_64()
    for part in document.strings:
        raw = part.encode()
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.intdigest()


def _framed(document: Document, tokenizer: Tokenizer, loss_on: LossOn) -> _Framed:
    everything = loss_on == "everything"
    if document.kind == "text":
        return _Framed(document, document.text, None, bare=True)
    if document.kind == "pair" and not tokenizer.chat_template:
        text = f"{document.prompt}\n{document.response}"
        learnt = None if everything else ((len(document.prompt) + 1, len(text)),)
        return _Framed(document, text, learnt, bare=True)
    turns = _turns(document, tokenizer)
    text = _rendered(turns, tokenizer, document.where)
    learnt = None if everything else _assistant_spans(turns, text, tokenizer, document.where)
    return _Framed(document, text, learnt, bare=False)


def _turns(document: Document, tokenizer: Tokenizer) -> list[dict[str, str]]:
    if document.kind == "pair":
        return [
            {"role": "user", "content": document.prompt},
            {"role": "assistant", "content": document.response},
        ]
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where} is a conversation, but the tokenizer of {tokenizer.name_or_path} "
            "has no chat template; give prompt and response, or add a template to the tokenizer"
        )
    return [{"role": m.role, "content": m.content} for m in document.messages]


def _rendered(
    turns: list[dict[str, str]], tokenizer: Tokenizer, where: str, *, ask: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses the conversation "
            f"({error}); change the row or the template"
        ) from None


def _assistant_spans(
    turns: list[dict[str, str]], text: str, tokenizer: Tokenizer, where: str
) -> tuple[Span, ...]:
    """Characters the assistant is to write: its content and whatever ends its turn.

    A turn opens where the conversation before it ends, generation prompt included, and closes
    where the conversation up to it ends; both must be beginnings of the whole.
    """
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if number == 0:
            raise DataError(f"{where} opens with an assistant message; put a user message first")
        before = _rendered(turns[:number], tokenizer, where, ask=True)
        upto = _rendered(turns[: number + 1], tokenizer, where)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise DataError(
                f"{where}: the chat template of {tokenizer.name_or_path} renders message "
                f"{number + 1} differently when more messages follow, so the assistant's tokens "
                "cannot be found; set data.loss_on to everything or give one answer per row"
            )
        spans.append((len(before), len(before) + _written(upto[len(before) :], turn["content"])))
    return tuple(spans)


def _written(turn: str, content: str) -> int:
    """Length of a turn without the whitespace that only separates it from the next; where
    whitespace is all that ends the turn, it is part of it."""
    trimmed = turn.rstrip()
    return len(turn) if trimmed.endswith(content.rstrip()) else len(trimmed)


def _tokenised(batch: Sequence[_Framed], tokenizer: Tokenizer) -> Iterator[Encoded]:
    with_spans = any(framed.learnt is not None for framed in batch)
    answer = tokenizer(
        [framed.text for framed in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_spans,
        verbose=False,
    )
    for number, framed in enumerate(batch):
        ids = answer["input_ids"][number]
        learnt = np.ones(len(ids), np.uint8)
        if framed.learnt is not None:
            learnt = _within(framed.learnt, answer["offset_mapping"][number])
        yield _encoded(framed, np.array(ids, np.int32), learnt, tokenizer)


def _within(spans: tuple[Span, ...], offsets: Sequence[Span]) -> np.ndarray:
    """1 for tokens that hold a character of a span; offsets ascend, so bisection finds them."""
    starts_T, stops_T = np.array(offsets, np.int64).reshape(-1, 2).T
    learnt = np.zeros(len(offsets), np.uint8)
    for start, stop in spans:
        learnt[(stops_T > start) & (starts_T < stop)] = 1
    return learnt


def _encoded(framed: _Framed, ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer) -> Encoded:
    if framed.bare and len(ids):
        bos, eos = (
            np.array([token] if token is not None else [], np.int32)
            for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        ids = np.concatenate([bos, ids, eos])
        learnt = np.concatenate([np.zeros(len(bos), np.uint8), learnt, np.ones(len(eos), np.uint8)])
    mask = np.zeros(len(ids), np.uint8)
    mask[:-1] = learnt[1:]
    return Encoded(content_key(framed.document), framed.document.where, ids, mask, len(framed.text))

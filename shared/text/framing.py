"""From documents to token ids, and which of them are learnt.

Text is framed as bos, text, eos, unless it brings them along. A prompt and its response are joined
by a newline and framed the same way, unless the tokenizer has a chat template: then they are a
user's and an assistant's turn. A whole document is tokenised at once, and its learnt tokens are
found by character offsets, so that ids are those of the plain text whatever merges cross a border.

T tokens of a document
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import xxhash

from shared.errors import DataError
from shared.images.row_image import RowImage
from shared.text.chat import Conversation, Span, Turn, turns_of, unfinished
from shared.text.documents import KNOWN_ROLES, Document
from shared.text.special_tokens import MARK, Specials, SpecialTokens

FRAMING_VERSION = 1
DOCUMENTS_PER_CALL = 512
LossOn = Literal["responses", "everything"]
ANSWERED = Document("pair", "a probe", prompt="a", response="b")


class Tokenizer(Protocol):
    """What is asked of a fast tokenizer; transformers' ones fit."""

    chat_template: Any
    name_or_path: str
    all_special_tokens: list[str]

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

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """A conversation as text."""
        ...


@dataclass(frozen=True, slots=True)
class Remarks:
    """What a document's line in the account of its domain is made of."""

    kind: str = "text"
    roles: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()  # fields of the row, and keys of messages
    special_as_text: int = 0  # special tokens written in the row
    special_as_control: int = 0
    changed_messages: int = 0  # by the chat template
    other_openings: int = 0  # answers that do not begin as the generation prompt says
    not_learnt: int = 0  # 1 where its messages say that nothing of it is learnt
    unknown_roles: tuple[str, ...] = ()  # of messages that are not learnt for their role's sake
    empty_answers: int = 0  # learnt answers without a word, call or thought
    unfinished: int = 0  # learnt answers that say that they go on


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as token ids."""

    key: int  # hash of the content: equal documents have equal keys
    where: str
    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # uint8 [T]; 1 where position t is trained to predict token t+1
    num_chars: int
    remarks: Remarks = Remarks()
    opening: int = 0  # tokens that come before the first answer, or bos alone
    has_prompt: bool = False
    second: int = 0  # where another document begins that is never apart from it; 0: there is none
    images: tuple[RowImage, ...] = ()  # in the order of their places
    family: int | None = None  # of documents that are held out together; None: its key


@dataclass(frozen=True, slots=True)
class _Framed:
    document: Document
    text: str
    learnt: tuple[Span, ...] | None  # None: every token
    remarks: Remarks
    masked: tuple[Span, ...] = ()  # not learnt, where every other token is
    adds_bos: bool = False
    adds_eos: bool = False


def encode(
    documents: Iterator[Document],
    *,
    tokenizer: Tokenizer,
    loss_on: LossOn,
    special_tokens: SpecialTokens = "auto",
) -> Iterator[Encoded]:
    """Token ids and loss masks of documents, tokenised in batches, in order.

    `special_tokens` says what those are that a row's own text holds: plain text, control tokens,
    or (auto) control tokens in what they frame already and plain text elsewhere.
    Raises DataError for conversations without a chat template, and for conversations whose
    template does not let the assistant's turns be found.
    """
    if not getattr(tokenizer, "is_fast", True):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no fast form (tokenizer.json); "
            "convert it with transformers first"
        )
    framing = _Framing(tokenizer, loss_on, special_tokens, Specials(tokenizer))
    while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
        yield from _tokenised([framing.framed(document) for document in batch], tokenizer)


def with_offsets(
    tokenizer: Tokenizer, texts: Sequence[str], **options: Any
) -> list[tuple[list[int], list[Span]]]:
    """Token ids of texts as a fast tokenizer frames them, and the characters of each token."""
    asked = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    read = tokenizer(list(texts), **asked, **options)
    return list(zip(read["input_ids"], read["offset_mapping"], strict=True))


def content_key(document: Document) -> int:
    """64-bit hash of a document's content."""
    state = xxhash.xxh3_64()
    for part in document.strings:
        raw = part.encode()
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.intdigest()


@dataclass(frozen=True, slots=True)
class _Framing:
    tokenizer: Tokenizer
    loss_on: LossOn
    special_tokens: SpecialTokens
    specials: Specials

    def framed(self, document: Document) -> _Framed:
        """What surrounds a document, and which characters of the whole are learnt."""
        if document.kind == "text":
            return self._bare(document, document.text, None)
        if self.tokenizer.chat_template:
            return self._conversation(document)
        _refuse_what_needs_a_template(document, self.tokenizer)
        prompt = f"{document.system}\n{document.prompt}" if document.system else document.prompt
        return self._bare(document, f"{prompt}\n{document.response}", len(prompt) + 1)

    def _bare(self, document: Document, text: str, response: int | None) -> _Framed:
        """Text between bos and eos, where it does not bring them; `response` starts the answer."""
        count, specials = self.specials.count(text), self.specials
        control = self._as_control(text)
        remarks = Remarks(
            kind=document.kind,
            unread=document.unread,
            special_as_text=0 if control else count,
            special_as_control=count if control else 0,
            empty_answers=int(response is not None and not text[response:].strip()),
        )
        adds_bos = not (control and specials.opens(text))
        adds_eos = not (control and specials.closes(text[response or 0 :]))
        if not adds_bos:  # whitespace outside the text's own bos and eos is no part of it
            outside = len(text) - len(text.lstrip())
            text, response = text[outside:], response and max(0, response - outside)
        text = text if adds_eos else text.rstrip()
        if count and not control:
            response = response and len(specials.marked(text[:response]))
            text = specials.marked(text)
        learnt = None
        if response is not None and self.loss_on == "responses":
            learnt = ((response, len(text)),)
        return _Framed(document, text, learnt, remarks, adds_bos=adds_bos, adds_eos=adds_eos)

    def _as_control(self, text: str) -> bool:
        if self.special_tokens == "auto":
            return self.specials.frames(text)
        return self.special_tokens == "control"

    def _conversation(self, document: Document) -> _Framed:
        count = self.specials.count("\n".join(document.strings))
        control = self.special_tokens == "control"
        turns, tools = turns_of(document), list(document.tools)
        if count and not control:
            turns, tools = self.specials.marked(turns), self.specials.marked(tools)
        talk = Conversation(document, turns, self.tokenizer, tools=tools)
        told = {n: m.learnt for n, m in enumerate(document.messages) if m.learnt is not None}
        learnt, masked = None, ()
        answers = [n for n, t in enumerate(turns) if told.get(n, t["role"] == "assistant")]
        if self.loss_on == "everything":
            masked = talk.spans([n for n, is_learnt in told.items() if not is_learnt])
        else:
            learnt = talk.spans(answers)
        open_ends = [n for n in unfinished(turns) if n in answers]
        masked = (*masked, *talk.endings(open_ends))
        remarks = Remarks(
            kind=document.kind,
            roles=tuple(dict.fromkeys(turn["role"] for turn in turns)),
            unread=(*document.unread, *talk.unread),
            special_as_text=0 if control else count,
            special_as_control=count if control else 0,
            changed_messages=talk.num_changed(learns_answers=self.loss_on == "responses"),
            other_openings=talk.other_openings,
            not_learnt=int(_is_silenced(turns, answers, told)),
            unknown_roles=_unknown_roles(turns, (*answers, *told)) if learnt is not None else (),
            empty_answers=talk.num_empty([n for n in answers if n not in open_ends]),
            unfinished=len(open_ends),
        )
        return _Framed(document, talk.text, learnt, remarks, masked)


def _is_silenced(turns: Sequence[Turn], learnt: Sequence[int], told: Mapping[int, bool]) -> bool:
    """Whether nothing is learnt, since the assistant's messages say so themselves."""
    masked = (not told.get(n, True) for n, t in enumerate(turns) if t["role"] == "assistant")
    return not learnt and any(masked)


def _unknown_roles(turns: Sequence[Turn], spoken_for: Sequence[int]) -> tuple[str, ...]:
    """Roles that are no usual ones, of turns that are neither learnt nor say that they are not."""
    roles = (turn["role"] for n, turn in enumerate(turns) if n not in spoken_for)
    return tuple(dict.fromkeys(role for role in roles if role not in KNOWN_ROLES))


def _refuse_what_needs_a_template(document: Document, tokenizer: Tokenizer) -> None:
    if document.kind == "pair" and not document.tools:
        return
    what = "is a conversation (messages, or a prompt with history)"
    what = "has tools" if document.kind == "pair" else what
    raise DataError(
        f"{document.where} {what}, but the tokenizer of {tokenizer.name_or_path} "
        "has no chat template; give prompt and response alone, or add a template to the tokenizer"
    )


def _tokenised(batch: Sequence[_Framed], tokenizer: Tokenizer) -> Iterator[Encoded]:
    has_offsets = any(f.learnt is not None or f.masked or MARK in f.text for f in batch)
    answer = tokenizer(
        [framed.text for framed in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=has_offsets,
        verbose=False,
    )
    for number, framed in enumerate(batch):
        ids = np.array(answer["input_ids"][number], np.int32)
        learnt = np.ones(len(ids), np.uint8)
        if has_offsets:
            offsets = np.array(answer["offset_mapping"][number], np.int64).reshape(-1, 2)
            if framed.learnt is not None:
                learnt = _within(framed.learnt, offsets)
            learnt[_within(framed.masked, offsets) == 1] = 0
            if MARK in framed.text:
                kept = ~_marks(framed.text, offsets)
                ids, learnt = ids[kept], learnt[kept]
        yield _encoded(framed, ids, learnt, tokenizer)


def _within(spans: tuple[Span, ...], offsets_T2: np.ndarray) -> np.ndarray:
    """1 for tokens that hold a character of a span."""
    starts_T, stops_T = offsets_T2.T
    learnt = np.zeros(len(offsets_T2), np.uint8)
    for start, stop in spans:
        learnt[(stops_T > start) & (starts_T < stop)] = 1
    return learnt


def _marks(text: str, offsets_T2: np.ndarray) -> np.ndarray:
    """Whether a token is of a mark alone [T]."""
    return np.array(
        [
            text[start:stop].strip(MARK) == "" != text[start:stop]
            for start, stop in offsets_T2.tolist()
        ],
        bool,
    )


def _encoded(framed: _Framed, ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer) -> Encoded:
    if len(ids):
        ends = (
            (tokenizer.bos_token_id, framed.adds_bos),
            (tokenizer.eos_token_id, framed.adds_eos),
        )
        bos, eos = (
            np.array([token] if token is not None and added else [], np.int32)
            for token, added in ends
        )
        ids = np.concatenate([bos, ids, eos])
        learnt = np.concatenate([np.zeros(len(bos), np.uint8), learnt, np.ones(len(eos), np.uint8)])
    mask = np.zeros(len(ids), np.uint8)
    mask[:-1] = learnt[1:]
    document, has_prompt = framed.document, framed.learnt is not None
    has_bos = ids[:1].tolist() == [tokenizer.bos_token_id]
    opening = int(np.argmax(learnt)) if has_prompt and learnt.any() else int(has_bos)
    return Encoded(
        key=content_key(document),
        where=document.where,
        input_ids=ids,
        loss_mask=mask,
        num_chars=len(framed.text),
        remarks=framed.remarks,
        opening=opening,
        has_prompt=has_prompt,
        images=document.images,
    )


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """eos, and the token that the chat template puts after an answer where that is another one.

    A template whose turns end in plain text gives none. `tokenizer` is a fast one of transformers.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    last = _last_learnt(tokenizer)
    if last is not None and last in tokenizer.added_tokens_decoder and last not in found:
        found.append(last)
    return tuple(found)


def _last_learnt(tokenizer: Any) -> int | None:
    """The last id that an answer teaches, None where the template does not take a plain answer."""
    try:
        (encoded,) = encode(iter([ANSWERED]), tokenizer=tokenizer, loss_on="responses")
    except Exception:  # a template is a program of its author's, and may need what is not there
        return None
    learnt_K = np.flatnonzero(encoded.loss_mask)
    return int(encoded.input_ids[learnt_K[-1] + 1]) if len(learnt_K) else None

"""What the teacher is shown in a student's place: context distillation.

Every document of a domain begins with the same tokens: bos, or what a chat template puts before a
user's first words. The teacher gets a longer beginning, which holds the prompt, and is asked about
the same tokens after it; so entry n of its answer is the student's position n, prompt or not.

T tokens of a document
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.data.rows import DRAW, Rows
from shared.errors import DataError
from shared.prompts.prompts import Prompt
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets
from shared.text.documents import Document, Kind, Message
from shared.text.framing import Tokenizer, encode

PROBES = ("Which way is north?", "7 x 8\n  is it?")  # a user's first words


class DocumentOpenings(Protocol):
    """What the documents of a domain begin with, for the student and for the teacher."""

    @property
    def longest(self) -> int:
        """Tokens by which a document is longer for the teacher at most."""
        ...

    def of(self, ids_T: np.ndarray, mask_T: np.ndarray, name: str) -> "Opening":
        """The opening of a document with this loss mask, of the row of a name."""
        ...

    def to_json(self) -> object:
        """What JSON takes, for `row_prompts.openings_from_json`."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """The token ids that a document begins with, or all of a domain; satisfies
    `DocumentOpenings`."""

    plain_ids: np.ndarray  # int32; in the student's rows
    shown_ids: np.ndarray  # int32; the same with the prompt, in the teacher's

    @property
    def longest(self) -> int:
        """See `DocumentOpenings`."""
        return len(self.shown_ids)

    def of(self, ids_T: np.ndarray, mask_T: np.ndarray, name: str) -> "Opening":
        """See `DocumentOpenings`."""
        return self

    def to_json(self) -> tuple[list[int], list[int]]:
        """Both parts as JSON takes them."""
        return self.plain_ids.tolist(), self.shown_ids.tolist()

    @staticmethod
    def from_lists(plain_ids: list[int], shown_ids: list[int]) -> "Opening":
        """The inverse of `to_json`."""
        return Opening(np.array(plain_ids, np.int32), np.array(shown_ids, np.int32))


def opening(prompt: Prompt, tokenizer: Tokenizer, kind: Kind) -> Opening:
    """The beginning of every document of a kind, without and with a prompt.

    Without a chat template the prompt's text stands between bos and the document. In a chat, the
    instruction is a system message and the examples are turns before the user's first; what a
    template changes for that is found by rendering probes. A conversation with a system message
    of its own keeps it, after the prompt.
    Raises DataError for a template that has no place for the prompt.
    """
    if kind == "text" or (kind == "pair" and not tokenizer.chat_template):
        return _bare(prompt, tokenizer)
    first, second = (_chat(prompt, tokenizer, words) for words in PROBES)
    if not (_same(first.plain_ids, second.plain_ids) and _same(first.shown_ids, second.shown_ids)):
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} writes the user's words differently "
            "after a prompt, so that the teacher could not be shown one; leave prompts out, or "
            "take models with another template"
        )
    return first


def shown(rows: Rows, openings: Mapping[str, DocumentOpenings]) -> Rows:
    """What the teacher is sent in place of rows: every document of a domain with an opening
    begins with the shown ids instead of the plain ones.

    A document that begins otherwise, such as the rest of one that was split, gets them put before
    it. Nothing in an opening has loss, but for its last position, which predicts what follows, so
    the loss positions and their labels are those of `rows`, in order. A row becomes one or more of
    the same name, none longer than the row itself, or than its longest document where that is
    longer now. Rows of other domains, and of one with an empty prompt, stay as they are.
    Raises DataError where a row learns tokens of its opening.
    """
    names, domains, draws = rows.names(), rows.domains(), rows.draws()
    indices = rows.table.column("index").to_pylist()
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    lines: list[tuple[str, int, _Line]] = []
    line_draws: list[int] = []
    for row, (ids, starts, mask) in enumerate(zip(*columns, strict=True)):
        whole = _Line(ids, starts, mask)
        instead = openings.get(domains[row])
        parts = [whole] if instead is None else _reopened(whole, instead, names[row])
        lines += [(domains[row], indices[row], part) for part in parts]
        line_draws += [draws[row]] * len(parts)
    sent = Rows.build(
        domains=[domain for domain, _, _ in lines],
        indices=[index for _, index, _ in lines],
        input_ids=[line.ids for _, _, line in lines],
        doc_starts=[line.starts for _, _, line in lines],
        loss_masks=[line.mask for _, _, line in lines],
    )
    if DRAW in rows.table.column_names:  # whatever the draws, so that units can be joined
        sent = sent.with_draws(np.array(line_draws))
    asked_NM, logprob_NX = rows.student_ids(), rows.student_logprobs()
    if asked_NM is None:
        return sent
    if logprob_NX is None:
        return sent.with_student_ids(asked_NM)
    return sent.with_student_logprobs(asked_NM, logprob_NX)


def shown_prompts(
    prompts: Sequence[np.ndarray],
    domains: Sequence[str],
    openings: Mapping[str, DocumentOpenings],
) -> list[np.ndarray]:
    """What the teacher goes on from in place of prompts of these domains, int32 [T] each."""
    rows = Rows.build(
        domains=domains,
        indices=range(len(prompts)),
        input_ids=prompts,
        doc_starts=[np.zeros(1)] * len(prompts),
        loss_masks=[np.zeros(len(ids)) for ids in prompts],
    )
    return shown(rows, openings).column("input_ids")


@dataclass(frozen=True, slots=True)
class PromptedReader:
    """A `TargetReader` whose teacher is shown prompts: asked about a unit, it answers about the
    unit's loss positions after them, in order."""

    reader: TargetReader
    openings: Mapping[str, DocumentOpenings]  # by domain

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made."""
        return self.reader.stats

    def submit(self, rows: Rows, question: Question) -> None:
        """Ask for a unit."""
        self.reader.submit(shown(rows, self.openings), question)

    def next(self) -> SoftTargets:
        """The oldest answer not yet taken; its rows are those that were sent."""
        return self.reader.next()

    def close(self) -> None:
        """Drop what is under way."""
        self.reader.close()


@dataclass(frozen=True, slots=True)
class _Line:
    ids: np.ndarray  # int32 [T]
    starts: np.ndarray  # int32
    mask: np.ndarray  # uint8 [T]

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and mask of each document."""
        cuts = self.starts[1:]
        yield from zip(np.split(self.ids, cuts), np.split(self.mask, cuts), strict=True)


def _reopened(row: _Line, openings: DocumentOpenings, name: str) -> list[_Line]:
    """The row's documents with their new openings, as many to a line as fit beside each other."""
    found = [(ids, mask, openings.of(ids, mask, name)) for ids, mask in row.documents()]
    if all(_same(own.plain_ids, own.shown_ids) for _, _, own in found):
        return [row]
    documents = [_reopened_document(ids, mask, own, name) for ids, mask, own in found]
    room = max(len(row.ids), *(len(ids) for ids, _ in documents))
    lines: list[list[tuple[np.ndarray, np.ndarray]]] = []
    taken = room
    for ids, mask in documents:
        if taken + len(ids) > room:
            lines.append([])
            taken = 0
        lines[-1].append((ids, mask))
        taken += len(ids)
    return [_joined(line) for line in lines]


def _reopened_document(
    ids: np.ndarray, mask: np.ndarray, opening: Opening, name: str
) -> tuple[np.ndarray, np.ndarray]:
    plain, shown_ids = opening.plain_ids, opening.shown_ids
    if _same(plain, shown_ids):
        return ids, mask
    size = len(plain) if _same(ids[: len(plain)], plain) else 0
    if mask[: max(0, size - 1)].any():
        raise DataError(
            f"row {name} learns tokens of the chat template before its text, which the teacher "
            "sees after a prompt; set data.loss_on=responses"
        )
    opened = np.zeros(len(shown_ids), np.uint8)
    if size and len(opened):
        opened[-1] = mask[size - 1]
    return np.concatenate([shown_ids, ids[size:]]), np.concatenate([opened, mask[size:]])


def _joined(documents: list[tuple[np.ndarray, np.ndarray]]) -> _Line:
    ids, masks = zip(*documents, strict=True)
    starts = np.cumsum([0, *(len(part) for part in ids[:-1])])
    return _Line(np.concatenate(ids), starts, np.concatenate(masks))


def _bare(prompt: Prompt, tokenizer: Tokenizer) -> Opening:
    """The prompt is tokenised by itself: the ids of a document stay those the student sees."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text = prompt.text()
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0] if text else []
    return Opening(np.array(bos, np.int32), np.array([*bos, *ids], np.int32))


def _chat(prompt: Prompt, tokenizer: Tokenizer, words: str) -> Opening:
    """The openings of one conversation: all before the tokens that both ways end with."""
    asked = (Message("user", words), Message("assistant", "It is."))
    system = (Message("system", prompt.instruction),) if prompt.instruction else ()
    turns = tuple(
        Message(role, content)
        for example in prompt.examples
        for role, content in (("user", example.prompt), ("assistant", example.response))
    )
    where = "a prompt, its instruction as a system message and its examples as turns"
    documents = [
        Document("messages", where, messages=messages)
        for messages in (asked, (*system, *turns, *asked))
    ]
    plain, with_prompt = (
        one.input_ids for one in encode(iter(documents), tokenizer=tokenizer, loss_on="everything")
    )
    common = _common_suffix(plain, with_prompt)
    return Opening(plain[: len(plain) - common], with_prompt[: len(with_prompt) - common])


def _common_suffix(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = one[len(one) - length :] != other[len(other) - length :]
    return length - int(np.flatnonzero(differs)[-1]) - 1 if differs.any() else length


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) == len(other) and bool((one == other).all())

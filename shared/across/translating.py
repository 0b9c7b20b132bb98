"""Rows for a teacher of another tokenizer: the text of the student's rows in its own tokens.

What a document says is read back from the student's tokens, so that a part of a document, cut where
its tokens end, is the same part for the teacher. A document whose text the teacher's tokenizer
changes, or that ends within a character, is nothing that both have read: it stands for itself
without a position with loss.

T tokens of a document of the student's   U of the teacher's
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shared.across.alignment import measure
from shared.across.token_bytes import TokenBytes
from shared.across.token_pair import TokenPair, written_as
from shared.data.row_store import RaggedRows, RowStore

ROWS_PER_CALL = 256


class Encoder(Protocol):
    """What is asked of the teacher's tokenizer; transformers' fast ones fit."""

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Token ids of texts, under `input_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class Translated:
    """Rows in the teacher's tokens, and how many documents are not what the student reads."""

    rows: RaggedRows
    documents: int
    left_out: int


@dataclass(frozen=True, slots=True)
class Translator:
    """From the student's tokens to the teacher's."""

    student: TokenBytes
    teacher: TokenBytes
    pair: TokenPair
    encoder: Encoder

    def translated(self, store: RowStore) -> Translated:
        """The rows of a file, row by row and document by document."""
        rows, documents, left_out = RaggedRows([], [], []), 0, 0
        for unit in store.units(ROWS_PER_CALL):
            columns = (unit.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
            found = [
                list(zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True))
                for ids, starts, mask in zip(*columns, strict=True)
            ]
            pieces = [piece for row in found for piece in row]
            others = list(self._documents(pieces))
            documents += len(others)
            left_out += sum(not is_read for _, _, is_read in others)
            for row in found:
                own, others = others[: len(row)], others[len(row) :]
                ids, masks, _ = zip(*own, strict=True)
                starts = np.cumsum([0, *(len(part) for part in ids[:-1])])
                rows.input_ids.append(np.concatenate(ids))
                rows.doc_starts.append(starts)
                rows.loss_masks.append(np.concatenate(masks))
        return Translated(rows, documents, left_out)

    def text(self, ids_T: np.ndarray) -> str | None:
        """What tokens say between the beginning and the end of a text; None where that begins or
        ends within a character, or has an unknown token."""
        own, parts = self.student, []
        ids = ids_T.tolist()
        ids = ids[int(ids[:1] == [own.bos]) :]
        ids = ids[: len(ids) - int(ids[-1:] == [own.eos])]
        if own.unk in ids and own.unk != own.eos:
            return None
        for index in ids:
            if index in own.specials:
                parts.append((written_as(index, own, self.teacher) or "").encode())
            else:
                parts.append(own.texts[index] or b"")
        whole = b"".join(parts)
        if self.pair.adds_space and ids and self.pair.student.spaced_V[ids[0]]:
            whole = whole[1:]
        try:
            return whole.decode()
        except UnicodeDecodeError:
            return None

    def _documents(
        self, pieces: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Ids and mask of the teacher's documents, and whether both read them alike."""
        texts = [self.text(ids) for ids, _ in pieces]
        options = {"return_attention_mask": False, "verbose": False}
        asked = [text or "" for text in texts]
        answer = self.encoder(asked, add_special_tokens=False, **options)["input_ids"]
        for (ids_T, mask_T), text, inner in zip(pieces, texts, answer, strict=True):
            ids_U = self._framed(ids_T, inner)
            mask_U = None if text is None else self._mask((ids_T, mask_T), ids_U, text)
            nothing = np.zeros(len(ids_U), np.uint8)
            yield ids_U, nothing if mask_U is None else mask_U, mask_U is not None

    def _framed(self, ids_T: np.ndarray, inner: Sequence[int]) -> np.ndarray:
        """Between the teacher's beginning and end, where the student's tokens have theirs or have
        no beginning at all."""
        own, others = self.student, self.teacher
        begins = others.bos is not None and (own.bos is None or ids_T[0] == own.bos)
        ends = others.eos is not None and len(ids_T) > 1 and ids_T[-1] == own.eos
        ids = [*([others.bos] if begins else []), *inner, *([others.eos] if ends else [])]
        return np.array(ids or [0], np.int32)

    def _mask(
        self, student: tuple[np.ndarray, np.ndarray], ids_U: np.ndarray, text: str
    ) -> np.ndarray | None:
        """Positions that predict a token with a byte that the student learns; None where the tokens
        are not the text."""
        mask_U = np.zeros(len(ids_U), np.uint8)
        measured = measure(student, (ids_U, mask_U), self.pair)
        if measured is None or not self._says(ids_U, text) or not self._controls(student[0], ids_U):
            return None
        own, others, _ = measured
        is_learnt = np.zeros(own.length + 1, np.int64)
        for start, end in zip(own.start_T[own.is_label_T], own.end_T[own.is_label_T], strict=True):
            is_learnt[start + 1 : end + 1] = 1
        before = np.cumsum(is_learnt)
        learnt_U = before[others.end_T] > before[others.start_T]
        learnt_U[:-1] |= others.is_lone_T[:-1] & learnt_U[1:]
        mask_U[:-1] = learnt_U[1:]
        return mask_U

    def _controls(self, ids_T: np.ndarray, ids_U: np.ndarray) -> bool:
        """Whether the teacher reads as special tokens what is special for the student too, and no
        text that has the same characters."""
        known = set(self.teacher.specials.values())
        ends = ((self.student, ids_T), (self.teacher, ids_U))
        asked, read = (
            [
                side.specials[index]
                for index in ids.tolist()
                if index in side.specials and index not in (side.bos, side.eos)
            ]
            for side, ids in ends
        )
        return [content for content in asked if content in known] == read

    def _says(self, ids_U: np.ndarray, text: str) -> bool:
        """Whether the teacher's tokens are the bytes of a text, after at most one space."""
        parts = [
            self.teacher.texts[index] or self.teacher.specials.get(index, "").encode()
            for index in ids_U.tolist()
            if index not in (self.teacher.bos, self.teacher.eos)
        ]
        whole, expected = b"".join(parts), text.encode()
        return whole in (expected, b" " + expected)

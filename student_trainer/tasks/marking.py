"""Marking of entities as a task: a language model writes a text again, those of one type marked."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from shared.across.token_bytes import TokenBytes, token_bytes
from shared.config.run import Config
from shared.data.rows import Rows
from shared.data.trust import Trust
from shared.errors import ConfigError, HandshakeError
from shared.prompts.marking import CLOSES, OPENS
from student_trainer.tasks.causal_lm import CausalLM
from student_trainer.tasks.task import Evaluation

if TYPE_CHECKING:
    from student_trainer.run import Run

OPEN, CLOSE = OPENS.encode(), CLOSES.encode()


@dataclass(frozen=True, slots=True)
class Marking(CausalLM):
    """Learns what is written, marks among it; a `Task`."""

    types: tuple[str, ...]
    template: str
    student: str
    revision: str | None
    trusted: bool

    def tokens(self) -> TokenBytes:
        """The bytes of the student's tokens. Raises ConfigError for tokens that are no bytes."""
        return _tokens(self.student, self.revision, self.trusted)

    def trust(self, config: Config) -> Trust:
        """As a language model's, once its tokens are known."""
        self.tokens()
        return CausalLM.trust(self, config)

    def inputs(self, rows: Rows) -> dict[str, np.ndarray]:
        """Of which entity each label is, see `entities_of`."""
        tokens, last = self.tokens(), 0
        found = [np.zeros(0, np.int64)]
        for ids, mask in zip(rows.column("input_ids"), rows.column("loss_mask"), strict=True):
            labels = ids[np.flatnonzero(mask) + 1]
            own = entities_of([tokens.of(int(label)) for label in labels])
            found.append(np.where(own > 0, own + last, own))
            last += int(own.max(initial=0))
        return {"entity_N": np.concatenate(found)}

    def evaluate(self, run: "Run") -> Evaluation:
        """As a language model's, and F1 of the entities that it marks."""
        from student_trainer.evaluation.marks import evaluate_marks  # slow, as torch is

        return evaluate_marks(run, self, CausalLM.evaluate(self, run))


@cache
def _tokens(student: str, revision: str | None, trusted: bool) -> TokenBytes:
    from transformers import AutoTokenizer  # slow

    asked = {"revision": revision or "main", "trust_remote_code": trusted}
    try:
        return token_bytes(AutoTokenizer.from_pretrained(student, **asked), model=student)
    except HandshakeError:
        raise ConfigError(
            f"task is marking, and the tokens of {student} are not the bytes of the text that they "
            "stand for, so that marks cannot be found; take a student with a byte-level or "
            "SentencePiece tokenizer, or set task=tagging"
        ) from None


def entities_of(written: list[bytes | None]) -> np.ndarray:
    """Of tokens of a text with marks the number of the entity, from 1, that each has a byte of; 0
    of other text, -1 of marks and of what is no text [N]."""
    whole = b"".join(part or b"" for part in written)
    is_of = np.zeros(len(whole), np.int64)
    number, at = 0, whole.find(OPEN)
    while at >= 0:
        number, first = number + 1, at + len(OPEN)
        stop = whole.find(CLOSE, first)
        stop = len(whole) if stop < 0 else stop
        is_of[at:first], is_of[first:stop] = -1, number
        is_of[stop : stop + len(CLOSE)] = -1
        at = whole.find(OPEN, stop)
    found, start = [], 0
    for part in written:
        own = is_of[start : start + len(part or b"")]
        start += len(own)
        found.append(int(own.max()) if (own > 0).any() else int(own.min(initial=0)) if part else -1)
    return np.array(found, np.int64)

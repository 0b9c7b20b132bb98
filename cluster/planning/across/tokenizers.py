"""A run's two tokenizers, where its config lets them differ: what pairs them, or why none can."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.planning.description import ModelDescription
from shared.across.token_bytes import TokenBytes, token_bytes
from shared.across.token_pair import TokenPair, pair_tokens
from shared.config.run import Config
from shared.errors import HandshakeError
from shared.text.tokenizers import same_tokens


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The tokenizers of a run across tokenizers, and what pairs their tokens."""

    student: TokenBytes
    teacher: TokenBytes
    pair: TokenPair
    load_teachers: Callable[[], Any]
    digests: tuple[str, str]  # of student and teacher, see `ModelDescription.rows_digest`
    are_same: bool
    rows: dict[str, int]  # of the embeddings of teacher and student

    def note(self) -> str:
        """A sentence for the start of a run."""
        if self.are_same:
            return "teacher and student have one tokenizer, whose tokens are compared as they are"
        return (
            f"{self.pair.overlap:,} of the teacher's {len(self.pair.student_of_W):,} tokens are "
            f"the same bytes as one of the student's {len(self.student):,}"
        )


def tokenizers_of(
    config: Config, teacher: ModelDescription, student: ModelDescription
) -> Tokenizers:
    """Both tokenizers of a config with `cross_tokenizer`. Raises HandshakeError where tokens of one
    are not the bytes of a text, or where none is the same in both and bytes are compared."""
    own, others = (
        token_bytes(model.load_tokenizer(), model=f"{model.option} {model.name}")
        for model in (student, teacher)
    )
    rows = {"teacher": teacher.vocab_size, "student": student.vocab_size}
    pair = pair_tokens(own, others, student_rows=rows["student"], teacher_rows=rows["teacher"])
    if config.cross_tokenizer == "aligned" and not pair.overlap:
        raise HandshakeError(
            f"cross_tokenizer is aligned, but no token of {teacher.name} (teacher) is the same "
            f"bytes as one of {student.name} (student); take cross_tokenizer=uld with "
            "{kind: total_variation, weight: 2}, or another teacher"
        )
    are_same = same_tokens(teacher.identity, student.identity)
    digests = (student.rows_digest, teacher.rows_digest)
    return Tokenizers(own, others, pair, teacher.load_tokenizer, digests, are_same, rows)

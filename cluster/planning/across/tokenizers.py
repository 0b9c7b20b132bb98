"""A run's two tokenizers, where its config lets them differ: what pairs them, or why none can."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.planning.description import ModelDescription
from shared.across.groups import Reader, in_groups
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
        said = (
            f"{self.pair.overlap:,} of the teacher's {len(self.pair.student_of_W):,} tokens are "
            f"the same bytes as one of the student's {len(self.student):,}"
        )
        if self.pair.group_V is None:
            return said
        return f"{said}, and each is the group of those that begin with it"


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
    if config.cross_tokenizer != "uld" and not pair.overlap:
        raise HandshakeError(
            f"cross_tokenizer is {config.cross_tokenizer}, but no token of {teacher.name} "
            f"(teacher) is the same bytes as one of {student.name} (student); take "
            "cross_tokenizer=uld with {kind: total_variation, weight: 2}, or another teacher"
        )
    are_same = same_tokens(teacher.identity, student.identity)
    if config.cross_tokenizer == "grouped" and not are_same:
        readers = (Reader(own, student.load_tokenizer()), Reader(others, teacher.load_tokenizer()))
        pair = in_groups(pair, *readers, student_rows=rows["student"])
    digests = (student.rows_digest, teacher.rows_digest)
    return Tokenizers(own, others, pair, teacher.load_tokenizer, digests, are_same, rows)

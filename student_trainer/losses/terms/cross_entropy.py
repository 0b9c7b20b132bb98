"""Cross-entropy with the text's own next token."""

from dataclasses import dataclass
from typing import Any, ClassVar

from student_trainer.losses.terms.term import ChunkView, Needs, TermValues


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """The label's negative log-probability, nats; no teacher is asked."""

    reported: ClassVar[tuple[str, ...]] = ()

    section: Any  # of the config: weight

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """Text of the data set."""
        return Needs(text=True)

    @property
    def is_kl_at(self) -> None:
        """None."""
        return None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """-log q of the label."""
        return TermValues(-chunk.label_logprob_n)

"""What a student answers: greedily, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A student's answer to one prompt."""

    key: str  # of the prompt's document
    right: str
    text: str
    probability: float  # of all its tokens, the one that ends it among them

    @property
    def is_right(self) -> bool:
        """Whether it is the right one but for spaces."""
        return self.text.split() == self.right.split()


def mistakes(answers: Sequence[Answer], classes: Sequence[str]) -> list[Answer]:
    """Hard negatives: rows that are taken for another class, the surest first; ties by key."""
    known = frozenset(classes)
    wrong = [answer for answer in answers if not answer.is_right and answer.text in known]
    return sorted(wrong, key=lambda answer: (-answer.probability, answer.key))

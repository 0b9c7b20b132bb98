"""What the stages of a round leave, as values and as files."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.active.answers import Answer
from cluster.active.chains import Chain
from cluster.active.filtering import LeftOut, Row


@dataclass(frozen=True, slots=True)
class Answers:
    """What a round's student answered, and its loss."""

    train: tuple[Answer, ...]
    validation: tuple[Answer, ...]
    loss: float  # nats per token of the domain's validation text
    chains: tuple[Chain, ...] = ()  # explanations of training prompts, where a method reads any

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Answers":
        """The inverse of `as_dict` after a trip through JSON."""
        train, validation = (
            tuple(Answer(**answer) for answer in fields[part]) for part in ("train", "validation")
        )
        chains = (Chain(**{**one, "steps": tuple(one["steps"])}) for one in fields["chains"])
        return Answers(train, validation, fields["loss"], tuple(chains))


@dataclass(frozen=True, slots=True)
class Kept:
    """A row of the teacher's that is learnt, and where it comes from."""

    row: Row
    asked: str  # digest of the answer on record
    parents: tuple[str, ...]  # keys of the training rows that the teacher was shown


@dataclass(frozen=True, slots=True)
class Harvest:
    """What a round's prompts gave."""

    asked: int  # prompts that there were
    answered: int  # for which the budget sufficed
    smallest: int  # tokens that the first of them may take
    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def is_cut_off(self) -> bool:
        """Whether nothing is kept, and the budget is why."""
        return not self.kept and "budget used up" in self.reasons

    @property
    def reasons(self) -> dict[str, int]:
        """Rows left out by reason, the most frequent first."""
        return dict(Counter(one.reason for one in self.left_out).most_common())

"""What became of a domain's documents, counted while they are tokenised."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.data.packing import Fit
from shared.text.framing import Encoded, Remarks
from shared.text.special_tokens import MARK

COUNTS = (
    *("special_as_text", "special_as_control"),
    *("changed_messages", "other_openings", "not_learnt", "empty_answers", "unfinished"),
)


@dataclass(slots=True)
class Tally:
    """Sums of the remarks on every document of a domain."""

    kinds: dict[str, int] = field(default_factory=dict)  # documents: text, pair, messages
    roles: dict[str, int] = field(default_factory=dict)  # documents that have it
    roles_without_loss: dict[str, int] = field(default_factory=dict)  # of those that are dropped
    unknown_roles: dict[str, int] = field(default_factory=dict)  # documents, of those that are kept
    unread: dict[str, int] = field(default_factory=dict)  # rows that have the field
    special_as_text: int = 0
    special_as_control: int = 0
    changed_messages: int = 0
    other_openings: int = 0
    not_learnt: int = 0  # documents that say so themselves
    empty_answers: int = 0
    unfinished: int = 0  # answers that say that they go on
    unfit: dict[str, int] = field(default_factory=dict)  # rows left out before, by the reason

    def over(self, documents: Iterator[Encoded]) -> Iterator[Encoded]:
        """The same documents, counted as they pass."""
        for document in documents:
            self._add(document.remarks, has_loss=bool(document.loss_mask.any()))
            yield document

    def _add(self, remarks: Remarks, *, has_loss: bool) -> None:
        _count(self.kinds, (remarks.kind,))
        _count(self.roles, remarks.roles)
        _count(self.unread, remarks.unread)
        if has_loss:
            _count(self.unknown_roles, remarks.unknown_roles)
        elif not remarks.not_learnt:
            _count(self.roles_without_loss, remarks.roles)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(remarks, name))


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of the documents of a split."""

    fit: Fit = field(default_factory=Fit)
    tally: Tally = field(default_factory=Tally)

    def silence(self) -> None:
        """Count a row that is left out as it says itself."""
        self.tally.not_learnt += 1
        self._drop()

    def leave_out(self, reason: str) -> None:
        """Count a row that is left out."""
        _count(self.tally.unfit, (reason,))
        self._drop()

    def _drop(self) -> None:
        self.fit.documents += 1
        self.fit.without_loss += 1


def listed(counts: dict[str, int], *, most: int = 8) -> str:
    """`name count` of each, the first ones where there are many."""
    named = [f"{shown(name)} {count:,}" for name, count in list(counts.items())[:most]]
    more = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join([*named, *more])


def shown(name: str, width: int = 40) -> str:
    """A name of a row's own, on one line of bounded length."""
    line = " ".join(name.replace(MARK, "").split())
    return line[: width - 2] + ".." if len(line) > width else line or "''"


def _count(counts: dict[str, int], names: tuple[str, ...]) -> None:
    for name in names:
        counts[name] = counts.get(name, 0) + 1

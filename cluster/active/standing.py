"""Which round's student is the best, and whether another round follows."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.active.classes import accuracy
from cluster.active.records import Answers
from shared.config.verbs.active import Active


@dataclass(frozen=True, slots=True)
class Standing:
    """What the rounds so far have come to."""

    best: int
    stopped: str = ""  # why no round follows, as a sentence; "": one does
    refused: bool = False  # it ended for a reason that the user can mend


def standing_of(results: Sequence[Answers], settings: Active) -> Standing:
    """After at least one round. The earlier of two that are as good is the better one."""
    by_loss = settings.metric == "loss"
    worth = [-one.loss if by_loss else accuracy(one.validation) for one in results]
    best, last = worth.index(max(worth)), len(results) - 1
    if last - best >= settings.patience:
        return Standing(
            best,
            f"No student was better than that of round {best} in {settings.patience} more rounds "
            "(active.patience).",
        )
    if last >= settings.rounds:
        return Standing(best, f"The teacher has written in {last} rounds (active.rounds).")
    return Standing(best)

"""Answers about rows that the teacher reads in place of the student's."""

from dataclasses import dataclass

from shared.data.rows import Rows
from shared.targets.soft_targets import SoftTargets


@dataclass(frozen=True, slots=True)
class PairedTargets:
    """A teacher's answer to a unit of rows of its own, whose row r belongs to row r of the
    student's unit; its entries are the positions with loss of its own rows."""

    rows: Rows
    targets: SoftTargets


def paired(rows: Rows, answer: object) -> PairedTargets:
    """What one teacher said of rows of its own, together with them."""
    assert isinstance(answer, SoftTargets), "one teacher reads rows of its own"
    return PairedTargets(rows, answer)

"""Ask ahead, take in order."""

import pytest

from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, answered
from shared.targets.soft_targets import SoftTargets
from tests.shared.store.test_target_store import SPEC, answer, make_rows


class Noting:
    """A reader that notes, in order, what it was asked and what was taken."""

    def __init__(self) -> None:
        self.asked: list[Rows] = []
        self.said: list[str] = []
        self.stats = ReaderStats()

    def submit(self, rows: Rows, spec: Question) -> None:
        assert spec == SPEC
        self.said.append(f"ask {len(self.asked)}")
        self.asked.append(rows)

    def next(self) -> SoftTargets:
        taken = sum(said.startswith("take") for said in self.said)
        self.said.append(f"take {taken}")
        return answer(self.asked[taken])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (0, "ask 0, take 0, use 0, ask 1, take 1, use 1, ask 2, take 2, use 2"),
        (1, "ask 0, take 0, ask 1, use 0, take 1, ask 2, use 1, take 2, use 2"),
        (2, "ask 0, ask 1, take 0, ask 2, use 0, take 1, use 1, take 2, use 2"),
        (9, "ask 0, ask 1, ask 2, take 0, use 0, take 1, use 1, take 2, use 2"),
    ],
)
def test_units_are_asked_ahead_and_taken_in_order(ahead: int, expected: str) -> None:
    reader, units = Noting(), [make_rows(index) for index in range(3)]
    for number, (rows, targets) in enumerate(answered(reader, iter(units), SPEC, ahead=ahead)):
        reader.said.append(f"use {number}")
        assert rows is units[number]
        targets.check(rows, SPEC)
    assert ", ".join(reader.said) == expected


def test_the_first_are_asked_before_anything_is_taken() -> None:
    reader = Noting()
    answers = answered(reader, [make_rows(0), make_rows(1), make_rows(2)], SPEC, ahead=2)
    assert reader.said == ["ask 0", "ask 1"]
    assert [rows.names() for rows, _ in answers] == [rows.names() for rows in reader.asked]


def test_nothing_is_asked_about_no_unit() -> None:
    reader = Noting()
    assert list(answered(reader, [], SPEC, ahead=2)) == []
    assert reader.said == []

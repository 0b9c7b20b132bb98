"""A tracker in its thread: raising, hanging and slow ones stop nothing, and no step comes twice."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from student_trainer.tracking.background import Background, Point, masked

HELD_S = 60.0


class Kept:
    """Keeps what it gets; raises at steps that it is told, and waits where it is held."""

    def __init__(self, raises: frozenset[int] = frozenset()) -> None:
        self.steps: list[int] = []
        self.notes: list[tuple[int, str]] = []
        self.closed = False
        self.free = threading.Event()
        self.free.set()
        self._raises = raises

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.free.wait(HELD_S)
        if step in self._raises:
            raise RuntimeError(f"no step {step} with secret-of-ours")
        self.steps.append(step)

    def note(self, step: int, text: str) -> None:
        self.notes.append((step, text))

    def close(self) -> None:
        self.closed = True


def behind(kept: Kept, folder: Path, said: list[str], **options) -> Background:
    return Background("Kept", lambda: kept, sent=folder / "kept.step", tell=said.append, **options)


def test_lines_and_notes_arrive_in_order_and_it_is_closed(tmp_path):
    kept, said = Kept(), []
    tracker = behind(kept, tmp_path, said, backlog=[Point(1, {}), Point(2, {})])
    tracker.note(2, "other")
    tracker.log(3, {})
    tracker.close()
    assert (kept.steps, kept.notes, kept.closed, said) == ([1, 2, 3], [(2, "other")], True, [])


def test_no_step_comes_twice_also_from_another_process(tmp_path):
    kept, said = Kept(), []
    for steps in ([1, 2, 3], [2, 3, 4]):
        tracker = behind(kept, tmp_path, said)
        for step in steps:
            tracker.log(step, {})
        tracker.close()
    assert kept.steps == [1, 2, 3, 4]


def test_a_tracker_that_hangs_holds_nobody_and_what_it_lost_is_said_once_and_counted(tmp_path):
    kept, said = Kept(), []
    kept.free.clear()
    tracker = behind(kept, tmp_path, said, most_waiting=4)
    for step in range(1, 101):
        tracker.log(step, {})
    tracker.close(by=0.0)  # a moment that has passed
    first, last = said
    assert first == "Kept is too slow or hangs, so lines are dropped; metrics.jsonl has all of them"
    lost = int(last.removeprefix("Kept: ").split()[0])
    assert "lines did not reach it; metrics.jsonl has all of them" in last
    assert 99 <= lost <= 100  # one may be in its hands
    kept.free.set()
    tracker._thread.join(HELD_S)
    assert not tracker._thread.is_alive()


def test_a_tracker_that_hangs_with_its_last_line_is_left(tmp_path):
    kept, said = Kept(), []
    kept.free.clear()
    tracker = behind(kept, tmp_path, said)
    tracker.log(1, {})
    while tracker._waiting.qsize():
        pass
    tracker.close(by=0.0)
    assert said == ["Kept did not end in time; metrics.jsonl has all lines"]
    kept.free.set()
    tracker._thread.join(HELD_S)
    assert not tracker._thread.is_alive()


def test_what_raises_goes_on_and_is_said_once_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT_API_KEY", "secret-of-ours")
    kept, said = Kept(frozenset({2, 3})), []
    tracker = behind(kept, tmp_path, said)
    for step in (1, 2, 3, 4):
        tracker.log(step, {})
    tracker.close()
    assert kept.steps == [1, 4]
    assert said == [
        "Kept does not take a line: no step 2 with ***; metrics.jsonl has all of them",
        "Kept: 2 lines did not reach it; metrics.jsonl has all of them",
    ]


def test_one_that_cannot_be_opened_is_said_and_takes_nothing(tmp_path):
    def refused():
        raise ConnectionError("https://me:word@host/x?token=abc refuses")

    said: list[str] = []
    tracker = Background("Kept", refused, sent=tmp_path / "kept.step", tell=said.append)
    for step in range(1000):
        tracker.log(step, {})
    tracker.close()
    assert said == [
        "no curves in Kept: https://***@host/x?token=*** refuses; metrics.jsonl has the numbers"
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://id:word@bucket/x", "s3://***@bucket/x"),
        ("runs/a?write_token=abc&b=1", "runs/a?write_token=***&b=1"),
        ("/home/me/data", "/home/me/data"),
    ],
)
def test_texts_for_others_have_no_passwords(text, shown):
    assert masked(text) == shown

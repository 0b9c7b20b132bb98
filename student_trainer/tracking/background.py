"""A tracker behind a thread of its own: it may raise, hang or be slow, and training never notices.

Lines wait in a bounded queue; those that find it full are dropped and counted, since
`metrics.jsonl` has them all.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from student_trainer.tracking.tracker import Tracker

MOST_WAITING = 256  # lines
CLOSE_S = 30.0
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_SHORTEST_SECRET = 6


@dataclass(frozen=True, slots=True)
class Point:
    """A line of `metrics.jsonl`, for every curve."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Note:
    """Something to say about the run."""

    step: int
    text: str


class Background:
    """A tracker that is opened and used in a thread; it gets no step that it got before."""

    def __init__(
        self,
        title: str,
        open_tracker: Callable[[], Tracker],
        *,
        sent: Path,
        tell: Callable[[str], None],
        backlog: Iterable[Point] = (),
        most_waiting: int = MOST_WAITING,
    ) -> None:
        """`sent` keeps the last step that was handed over, across processes; `backlog` comes before
        all else, and `tell` says things to people."""
        self._title, self._open, self._tell = title, open_tracker, tell
        self._sent, self._backlog = sent, list(backlog)
        self._waiting: queue.Queue[Point | Note | None] = queue.Queue(most_waiting)
        self._dropped = 0  # lines that found the queue full, or were not taken
        self._said = False
        self._gone = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{title}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a line over, or drop it; never waits."""
        self._put(Point(step, values))

    def note(self, step: int, text: str) -> None:
        """Hand a note over; never waits."""
        self._put(Note(step, text))

    def close(self, by: float | None = None) -> None:
        """Let what waits be sent, until a moment of `time.monotonic`; then leave it."""
        by = time.monotonic() + CLOSE_S if by is None else by
        with suppress(queue.Full):
            self._waiting.put(None, timeout=max(0.0, by - time.monotonic()))
        self._thread.join(max(0.0, by - time.monotonic()))
        left = self._leave() if self._thread.is_alive() else 0
        if self._dropped or left:
            self._tell(
                f"{self._title}: {self._dropped + left} lines did not reach it; metrics.jsonl has "
                "all of them"
            )
        elif self._thread.is_alive():
            self._tell(f"{self._title} did not end in time; metrics.jsonl has all lines")

    def _leave(self) -> int:
        """Take out what waits, so that the thread ends after what it is at; returns how many
        lines it was."""
        lines = 0
        with suppress(queue.Empty):
            while True:
                lines += self._waiting.get_nowait() is not None
        self._waiting.put(None)
        return lines

    def _put(self, item: Point | Note) -> None:
        if self._gone:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._lose("is too slow or hangs, so lines are dropped")

    def _work(self) -> None:
        try:
            tracker = self._open()
        except Exception as error:  # of a library we do not know
            self._gone = True
            self._tell(
                f"no curves in {self._title}: {_reason(error)}; metrics.jsonl has the numbers"
            )
            return
        last = _step_in(self._sent)
        for point in self._backlog:
            last = self._send(tracker, point, last)
        self._backlog.clear()
        while (item := self._waiting.get()) is not None:
            last = self._send(tracker, item, last)
        try:
            tracker.close()
        except Exception as error:
            self._tell(f"{self._title} does not end well: {_reason(error)}")

    def _send(self, tracker: Tracker, item: Point | Note, last: int) -> int:
        """Returns the last step that was handed over. It is written down before, so that no step is
        handed over twice, whenever the process dies."""
        try:
            if isinstance(item, Note):
                tracker.note(item.step, item.text)
            elif item.step > last:
                last = item.step
                _keep(self._sent, last)
                tracker.log(item.step, item.values)
        except Exception as error:
            self._lose(f"does not take a line: {_reason(error)}")
        return last

    def _lose(self, why: str) -> None:
        """Count a line that is lost; the first is said."""
        self._dropped += 1
        if not self._said:
            self._said = True
            self._tell(f"{self._title} {why}; metrics.jsonl has all of them")


def masked(text: str) -> str:
    """A text without what stands in secret variables, and without passwords in addresses."""
    for name, value in os.environ.items():
        if _SECRET.search(name.upper()) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"((?:token|key|password)=)[^&\s]+", r"\1***", text, flags=re.I)


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind where it says nothing."""
    return masked((str(error).strip().splitlines() or [type(error).__name__])[0])


def _step_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _keep(path: Path, step: int) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(str(step))
    draft.replace(path)

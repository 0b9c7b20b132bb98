"""TensorBoard: event files in the run's folder, one for each time that it goes on.

The first event of a file says from which step on it replaces what earlier files hold, so that steps
taken again after a resume show once. What cannot be written is said once and stops no training.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text as text_summary

from shared.errors import reason_of

FILE_VERSION = "brain.Event:2"


class EventFiles:
    """A tracker whose file is made when there is something to write. `after` is the step that the
    run goes on from; `tell` says things to people."""

    def __init__(self, folder: Path, *, after: int, tell: Callable[[str], None]) -> None:
        self._folder, self._after, self._tell = folder, after, tell
        self._file: IO[bytes] | None = None
        self._failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=points)))

    def note(self, step: int, text: str) -> None:
        """Add a text to the step."""
        self._write(Event(step=step, summary=text_summary("note", text)))

    def _write(self, event: Event) -> None:
        try:
            if self._file is None and not self._failed:
                self._file = self._opened()
            self._put(event)
        except OSError as error:
            self._failed = True
            self.close()
            self._tell(
                f"no further curves in {self._folder}: {reason_of(error)}; metrics.jsonl has the "
                "numbers"
            )

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return  # said already: what is left to write is what failed

    def _opened(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._folder / name).open("wb")
        self._put(Event(file_version=FILE_VERSION))
        replaced = SessionLog(status=SessionLog.START)
        self._put(Event(step=self._after + 1, session_log=replaced))
        return self._file

    def _put(self, event: Event) -> None:
        """Append a record: length, its checksum, the event, its checksum."""
        if self._file is None:
            return
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])
        self._file.flush()

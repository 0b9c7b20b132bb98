"""A run's curves for TensorBoard: event files in its folder, one for each time that it goes on.

The first event of a file says from which step on it replaces what earlier files hold, so that steps
taken again after a resume show once. What cannot be written is said once and stops no training.
"""

import logging
import os
import socket
import struct
import time
from pathlib import Path
from typing import IO

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboardX.record_writer import masked_crc32c

from shared.config.run import Config
from shared.errors import reason_of
from shared.run.metrics import StepMetrics
from student_trainer.exported import measured

log = logging.getLogger(__name__)

FILE_VERSION = "brain.Event:2"


class Curves:
    """The event file of a process; made when there is a line to write. `after` is the step that
    the run goes on from."""

    def __init__(self, folder: Path, *, after: int) -> None:
        self._folder, self._after = folder, after
        self._file: IO[bytes] | None = None
        self._failed = False

    def write(self, line: StepMetrics, config: Config, *, steps_in_line: int) -> None:
        """Add a point to every curve, at the line's step."""
        values = [
            Summary.Value(tag="/".join([name, *labels]), simple_value=value)
            for (name, labels), value in _named(line, config, steps_in_line).items()
        ]
        try:
            if self._file is None and not self._failed:
                self._file = self._opened()
            self._put(Event(step=line.step, summary=Summary(value=values)))
        except OSError as error:
            self._failed = True
            self.close()
            log.warning(
                "no further curves in %s: %s; metrics.jsonl has the numbers",
                self._folder,
                reason_of(error),
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


def _named(
    line: StepMetrics, config: Config, steps_in_line: int
) -> dict[tuple[str, tuple[str, ...]], float]:
    """What was measured, by the name of its metric and what its labels are beside the run."""
    return {
        (metric.short, tuple(labels.values())): value
        for metric, labels, value in measured(line, config, steps_in_line=steps_in_line)
        if value is not None
    }

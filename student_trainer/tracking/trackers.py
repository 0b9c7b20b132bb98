"""The trackers of a run: TensorBoard's files always, beyond them those that its config names.

All get the same numbers, at the run's own steps. Of steps taken again after a resume TensorBoard
shows those taken last and the others those taken first, the same but for a changed config.
A tracker that lacks lines of `metrics.jsonl` gets them first.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared.config.run import Config
from shared.errors import StorageError
from shared.run.changes import leaves
from shared.run.metrics import StepMetrics, read_metrics
from shared.run.run_dir import RunDir, run_label, write_atomically
from student_trainer.metrics.exported import measured
from student_trainer.tracking.background import CLOSE_S, Background, Point, masked
from student_trainer.tracking.services import SERVICES
from student_trainer.tracking.tensorboard import EventFiles
from student_trainer.tracking.tracker import TrackedRun, Tracker

RECORD = "run.json"
Tell = Callable[[str], None]


class Trackers:
    """All trackers of a process, as one."""

    def __init__(self, files: EventFiles, others: Sequence[Background] = ()) -> None:
        self._others = tuple(others)
        self._all: tuple[Tracker, ...] = (files, *others)

    def write(self, line: StepMetrics, config: Config, *, steps_in_line: int) -> None:
        """Add a line's numbers to all curves."""
        values = named_values(line, config, steps_in_line=steps_in_line)
        for tracker in self._all:
            tracker.log(line.step, values)

    def note(self, step: int, text: str) -> None:
        """Say something about the run in all of them."""
        for tracker in self._all:
            tracker.note(step, text)

    def close(self) -> None:
        """End them; those that do not end in time are left."""
        by = time.monotonic() + CLOSE_S
        for other in self._others:
            other.close(by)
        self._all[0].close()


def open_trackers(files: RunDir, config: Config, *, step: int, tell: Tell) -> Trackers:
    """The trackers of a run that goes on after `step`; a config that has changed is noted in them.

    `tell` says things to people, from any thread.
    """
    label = run_label(config, files.path)
    options = dict(_shown(config))
    record = _record(files, options, tell)
    lines = read_metrics(files.metrics) if config.trackers else []
    tracked = TrackedRun(
        id=record["id"],
        name=label,
        folder=files.path,
        runs=Path(config.paths.runs),
        options=options,
        steps_done=step,
    )
    others = [
        Background(
            SERVICES[name].title,
            partial(SERVICES[name].open, tracked),
            sent=files.trackers / f"{name}.step",
            tell=tell,
            backlog=_points([line for line in lines if line.step <= step], config),
        )
        for name in config.trackers
    ]
    trackers = Trackers(EventFiles(files.curves, after=step, tell=tell), others)
    if step and (changed := _changed(record["options"], options)):
        trackers.note(step, f"from step {step} with {changed}")
    return trackers


def named_values(line: StepMetrics, config: Config, *, steps_in_line: int) -> dict[str, float]:
    """What was measured, by curve: the metric's name and its labels beside the run, as
    `domain_kl/code`."""
    return {
        "/".join([metric.short, *labels.values()]): value
        for metric, labels, value in measured(line, config, steps_in_line=steps_in_line)
        if value is not None
    }


def _points(lines: Sequence[StepMetrics], config: Config) -> list[Point]:
    """Lines that were written before, for who has not got them."""
    before = [0, *(line.step for line in lines)]
    return [
        Point(line.step, named_values(line, config, steps_in_line=line.step - previous))
        for line, previous in zip(lines, before, strict=False)
    ]


def _shown(config: Config) -> Iterator[tuple[str, str | float | None]]:
    """Options as plain values, for others to see; where folders lie is left out."""
    for name, value in leaves(config.model_dump(mode="json", exclude={"paths"})):
        plain = value is None or isinstance(value, int | float)
        yield name, value if plain else masked(value if type(value) is str else json.dumps(value))


def _record(files: RunDir, options: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """The run's id and the options it had when it last went on; those of this time replace them."""
    path = files.trackers / RECORD
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        record = {"id": uuid.uuid4().hex, "options": options}
    try:
        files.trackers.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"id": record["id"], "options": options}, indent=1))
    except (OSError, StorageError) as error:
        tell(f"trackers will not know this run again: {error}")
    return record


def _changed(before: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Options that differ, with both values; of lists and maps as they are."""
    names = [n for n in {**before, **options} if before.get(n) != options.get(n)]
    return ", ".join(f"{n} {options.get(n)} (was {before.get(n)})" for n in names)

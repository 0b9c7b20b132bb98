"""What a probe measured, as plain values, and what a run of the same config follows from it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.config.run import Config

STEP_PART = "activations and loss"  # what lives in a step and not between steps


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """A process at the moment at which it held most, in bytes."""

    parts: Mapping[str, int]  # of tensors
    kept: int  # by allocators and libraries beyond tensors, since the model was loaded
    libraries: int  # before the model: Python and what it imports

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values()) + self.kept + self.libraries


@dataclass(frozen=True, slots=True)
class Logits:
    """The widest tensor [n, V] of a step, beside what a step has in all."""

    widest: int  # n
    positions: int  # N with loss of the unit
    chunk: int | None  # positions that a chunk has at most; None: all ids are asked of each
    vocabulary: int  # V


@dataclass(frozen=True, slots=True)
class StudentProbe:
    """One worker."""

    memory: ProcessMemory
    longest_bytes: int  # the most in the steps of the longest rows
    later_bytes: int  # and by the end of the steps after them
    logits: Logits | None  # None: what is asked of the teacher is all ids
    steps: Sequence[Mapping[str, float]]  # seconds: all, wait, compute, optimiser; and tokens
    validation_s: float  # of all validation rows, about
    checkpoint_s: float
    checkpoint_bytes: int

    @property
    def step(self) -> dict[str, float]:
        """Means of the steps."""
        return {
            name: sum(step[name] for step in self.steps) / len(self.steps) for name in self.steps[0]
        }


@dataclass(frozen=True, slots=True)
class TeacherProbe:
    """One process of a replica, which has several where it is spread."""

    memory: ProcessMemory
    logits: Logits | None
    tokens: int  # of training's units that were timed, padding apart
    seconds: float  # of these
    timed: int  # units
    followed: int  # units of training that were not timed
    leads: bool = True  # its replica: the other processes work on the same units

    @property
    def tokens_per_s(self) -> float:
        """Positions read a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Probe:
    """The processes of a probe, workers by rank."""

    student: Sequence[StudentProbe]
    teachers: Mapping[str, Sequence[TeacherProbe]]
    num_steps: int

    def memory(self, side: str) -> ProcessMemory:
        """Of the process of a side that took most."""
        found: Iterable[Any] = self.student if side == "student" else self.teachers[side]
        return max((one.memory for one in found), key=lambda memory: memory.total)

    def replicas(self, name: str) -> list[TeacherProbe]:
        """The process of each replica of a teacher that answers for it."""
        return [one for one in self.teachers[name] if one.leads]

    def teacher_s(self, name: str) -> float:
        """Seconds that one replica would work for a step."""
        found = self.replicas(name)
        timed, seconds = sum(one.timed for one in found), sum(one.seconds for one in found)
        units = timed + sum(one.followed for one in found)
        return seconds / max(1, timed) * units / self.num_steps

    def whole_run_s(self, config: Config) -> float:
        """Seconds of evaluations and checkpoints of a run, beside its steps."""
        first = self.student[0]
        decisions = len(config.decision_steps) if config.decides_from_validation else 0
        saves = -(-config.steps // config.checkpoints.every)
        return (2 + decisions) * first.validation_s + saves * first.checkpoint_s

    def unbounded(self) -> list[tuple[str, Logits]]:
        """Tensors [n, V] of more positions than a chunk has, by side."""
        found: list[tuple[str, Logits | None]] = [("the student", s.logits) for s in self.student]
        found += [(name, t.logits) for name, all_ in self.teachers.items() for t in all_]
        return [
            (side, logits)
            for side, logits in found
            if logits is not None and logits.chunk is not None and logits.widest > logits.chunk
        ]


def write(path: Path, found: StudentProbe | TeacherProbe) -> None:
    """Keep one process's values, whole at every moment."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(asdict(found)))
    aside.replace(path)


def read(folder: Path, teachers: Iterable[str], *, num_steps: int) -> Probe:
    """What the processes of a probe wrote to a folder, `student-*` and `teacher-NAME-*`."""
    students = [StudentProbe(**_built(path)) for path in sorted(folder.glob("student-*.json"))]
    replicas = {name: sorted(folder.glob(f"teacher-{name}-*.json")) for name in teachers}
    found = {
        name: [TeacherProbe(**_built(path)) for path in paths]
        for name, paths in replicas.items()
        if paths
    }
    return Probe(students, found, num_steps)


def _built(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    found["memory"] = ProcessMemory(**found["memory"])
    found["logits"] = found["logits"] and Logits(**found["logits"])
    return found

"""What a teacher's modules learn from: the rows of one step with what the student says of them,
asked as a unit is, and answered by the version of the modules that came of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pyarrow as pa
import xxhash

from shared.data.rows import Rows
from shared.errors import TeacherError
from shared.targets.weights import WeightsRef


@dataclass(frozen=True, slots=True)
class Lesson:
    """One update of a teacher's modules; with its rows and the modules it determines the next
    version."""

    modules: WeightsRef  # that are updated
    units: tuple[int, ...]  # rows of each forward pass, in their order

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Lesson":
        """The inverse of `as_dict`."""
        return Lesson(WeightsRef(**fields["modules"]), tuple(fields["units"]))


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a teacher answers to a lesson: one row of an Arrow table."""

    table: pa.Table

    @staticmethod
    def build(
        rows: Rows, modules: WeightsRef, *, fingerprint: Mapping[str, str], nll: float, kl: float
    ) -> "Learnt":
        """`nll` and `kl` are the modules' losses before the update, nats per loss token."""
        described = {"lesson": _digest(rows), "teacher": json.dumps(dict(fingerprint))}
        return Learnt(pa.Table.from_pylist([asdict(modules) | {"nll": nll, "kl": kl} | described]))

    @property
    def modules(self) -> WeightsRef:
        """The version that came of it."""
        found = self._row
        return WeightsRef(found["version"], found["digest"])

    @property
    def losses(self) -> tuple[float, float]:
        """NLL of the labels, and divergence from the student, nats per loss token."""
        return self._row["nll"], self._row["kl"]

    @property
    def num_bytes(self) -> int:
        """Bytes of the serialised Table."""
        return self.table.nbytes

    def check(self, rows: Rows, lesson: Lesson, teacher: Mapping[str, str] | None = None) -> None:
        """Raise TeacherError for an answer to another lesson, or from another teacher."""
        expected = lesson.modules.version + 1
        if self._row["lesson"] != _digest(rows) or self.modules.version != expected:
            raise TeacherError(
                f"the answer is not version {expected} of the modules, learnt from rows "
                f"{rows.named()}"
            )
        if teacher is not None and json.loads(self._row["teacher"]) != dict(teacher):
            raise TeacherError("the answer comes from another teacher than the run started with")

    @property
    def _row(self) -> dict[str, Any]:
        return self.table.to_pylist()[0]


class ModuleTrainer(Protocol):
    """Where lessons go: replicas of a teacher, or an engine in this process."""

    def submit(self, rows: Rows, lesson: Lesson, /) -> None:
        """Ask for an update; never blocks."""
        ...

    def next(self) -> Learnt:
        """The oldest answer not yet taken, waited for. Raises UserError or TeacherError."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...


OpenModules = Callable[[], ModuleTrainer]  # called on rank 0 only; picklable


def _digest(rows: Rows) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(rows.hashes()))

"""TeacherReplica: an engine in a process of its own.

The compute group scores one unit at a time; the control group answers while it does. Answers are
returned as values, never as references of this process, so that they outlive it.
"""

import os
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle

from shared.errors import TeacherError, TutelageError
from shared.rows import Rows
from shared.soft_targets import TargetSpec
from teacher_service.description import Engine, MakeEngine, TeacherDescription

# A threaded actor: each group has threads of its own.
OPTIONS: dict[str, Any] = {
    "max_restarts": -1,
    "max_task_retries": 0,
    "concurrency_groups": {"compute": 1, "control": 2},
}


@dataclass(frozen=True, slots=True)
class Health:
    """What a replica says about itself; counters are of this process, not of those before it."""

    incarnation: str  # new after every restart
    pid: int
    node: str
    units: int = 0
    tokens: int = 0  # of the rows scored, with or without loss
    busy_s: float = 0.0
    failure: str = ""  # why the engine could not be loaded


@ray.remote(**OPTIONS)
class TeacherReplica:
    """Loads its engine in the constructor, so that a restarted process is ready by itself."""

    def __init__(self, pickled_make_engine: bytes) -> None:
        self._health = Health(
            incarnation=uuid.uuid4().hex,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
        )
        self._engine: Engine | None = None
        self._failure: TutelageError | None = None
        make_engine: MakeEngine = cloudpickle.loads(pickled_make_engine)
        try:
            self._engine = make_engine()
        except TutelageError as error:
            # Kept for the caller: what a constructor raises reaches nobody as it is.
            self._failure = error
            self._health = replace(self._health, failure=str(error))

    @ray.method(concurrency_group="compute")
    def score(self, table: pa.Table, spec: dict[str, Any]) -> pa.Table:
        """Answer one unit. A UserError is final, a TeacherError may pass on another replica."""
        rows, started = Rows(table), time.monotonic()
        try:
            answer = self._loaded().score(rows, TargetSpec.from_dict(spec))
        except TutelageError:
            raise
        except Exception as error:  # foreign errors may not survive pickling
            lines = str(error).strip().splitlines() or [""]
            raise TeacherError(f"{type(error).__name__}: {lines[0]}") from None
        self._health = replace(
            self._health,
            units=self._health.units + 1,
            tokens=self._health.tokens + sum(map(len, rows.column("input_ids"))),
            busy_s=self._health.busy_s + time.monotonic() - started,
        )
        return answer.table

    @ray.method(concurrency_group="compute")
    def flush(self) -> None:
        """Returns when every unit that came before has been answered."""

    @ray.method(concurrency_group="control")
    def describe(self) -> TeacherDescription:
        """What was loaded. Raises the UserError that loading raised."""
        return self._loaded().describe()

    @ray.method(concurrency_group="control")
    def health(self) -> Health:
        """Counters; answers while a unit is being scored."""
        return self._health

    def _loaded(self) -> Engine:
        if self._failure is not None:
            raise self._failure
        assert self._engine is not None, "an engine is loaded or its failure is kept"
        return self._engine

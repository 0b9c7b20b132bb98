"""TeacherReplica: an engine in a process of its own.

The compute group works on one unit at a time; the control group answers while it does. Answers are
returned as values, never as references of this process, so that they outlive it.
"""

import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.util.metrics
from ray import cloudpickle

from shared.data.rows import Rows
from shared.errors import ConfigError, TeacherError, TutelageError
from shared.loading import in_few_bits
from shared.run import exported, exporter
from shared.run.threads import use_threads
from shared.targets.asks.head_location import ShippedHead
from shared.targets.canary import Canary
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.lessons import Lesson
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.description import Engine, Learner, MakeEngine, TeacherDescription
from teacher_service.service.replicas.naming import Request, service_of, short_name
from teacher_service.service.replicas.ranks import Ranks

# A threaded actor: each group has threads of its own.
OPTIONS: dict[str, Any] = {
    "max_restarts": -1,
    "max_task_retries": 0,
    "concurrency_groups": {"compute": 1, "control": 2},
}


SPEED_S = 30.0  # over which the speed of a replica is measured
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Health:
    """What a replica says about itself; counters are of this process, not of those before it."""

    incarnation: str  # new after every restart
    pid: int
    node: str
    units: int = 0
    tokens: int = 0  # read or written, with or without loss
    busy_s: float = 0.0
    failure: str = ""  # why the engine could not be loaded


@ray.remote(**OPTIONS)
class TeacherReplica:
    """Loads its engine in the constructor, so that a restarted process is ready by itself."""

    def __init__(
        self, pickled_make_engine: bytes, cpus: float = 1, spread: Request | None = None
    ) -> None:
        """`spread` is what a replica of several ranks was asked for with, of which this one
        leads."""
        use_threads(cpus)
        self._health = Health(
            incarnation=uuid.uuid4().hex,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
        )
        self._engine: Engine | None = None
        self._failure: TutelageError | None = None
        self._begun: float | None = None  # the unit that is worked on
        self._seen = deque([(time.monotonic(), 0, 0.0)])  # when, tokens and seconds of work by then
        self._name = ray.get_runtime_context().get_actor_name() or ""
        # The context's namespace is that of the job which made this actor, not the service's.
        labels = {"service": service_of(self._name), "replica": short_name(self._name)}
        exporter.start(ray.util.metrics, **labels).sample(self._export)
        make_engine: MakeEngine = cloudpickle.loads(pickled_make_engine)
        self._ranks = None if spread is None else Ranks(self._name, spread)
        try:
            self._engine = make_engine() if self._ranks is None else self._ranks.load(make_engine)
            self._canary = self._watched(self._engine.describe())
        except TutelageError as error:
            # Kept for the caller: what a constructor raises reaches nobody as it is.
            self._failure = error
            self._health = replace(self._health, failure=str(error))

    def __repr__(self) -> str:
        return self._name

    @ray.method(concurrency_group="compute")
    def score(self, table: pa.Table, spec: dict[str, Any]) -> pa.Table:
        """Answer one unit. A UserError is final, a TeacherError may pass on another replica."""
        rows, _ = Rows(table), self._loaded()
        with self._at_work() as done:
            self._look()
            answer = self._score(rows, Question.from_dict(spec))
            done(rows.column("input_ids"))
        return answer.table

    @ray.method(concurrency_group="compute")
    def generate(self, table: pa.Table, spec: dict[str, Any]) -> pa.Table:
        """Continue one batch of openings, with the same errors."""
        openings, engine = Openings(table), self._loaded()
        with self._at_work() as done:
            self._look()
            answer = self._together(
                lambda: engine.generate(openings, GenerationSpec.from_dict(spec)),
                "generate",
                table,
                spec,
            )
            done([*openings.ids(), *answer.ids()])
        return answer.table

    @ray.method(concurrency_group="compute")
    def learn(self, table: pa.Table, spec: dict[str, Any]) -> pa.Table:
        """Update the modules that learn beside a student, with the same errors."""
        rows, engine = Rows(table), self._loaded()
        if not isinstance(engine, Learner):
            raise ConfigError(
                f"teacher {self._name} has no modules that learn; set "
                "teachers.NAME.online_modules, and start it with `tutelage run`"
            )
        with self._at_work() as done:
            answer = engine.learn(rows, Lesson.from_dict(spec))
            done(rows.column("input_ids"))
        return answer.table

    @ray.method(concurrency_group="compute")
    def ship_head(self) -> ShippedHead:
        """Keep the engine's head in its cache. A UserError is final."""
        with self._at_work():
            return self._together(self._loaded().ship_head, "ship_head")

    @ray.method(concurrency_group="compute")
    def flush(self) -> None:
        """Returns when every unit that came before has been answered."""

    @ray.method(concurrency_group="control")
    def describe(self) -> TeacherDescription:
        """What was loaded. Raises the UserError that loading raised."""
        return self._loaded().describe()

    @ray.method(concurrency_group="control")
    def health(self) -> Health:
        """Counters; answers while a unit is being scored, which it counts as work."""
        return replace(self._health, busy_s=self._busy_s())

    def _watched(self, described: TeacherDescription) -> Canary | None:
        """A canary on what was loaded, where it scores. Raises EngineError where it answers nothing
        sound."""
        if not described.watched:
            return None
        fingerprint = described.fingerprint
        canary = Canary(
            self._score,
            f"the engine of {fingerprint.get('model', self._name)}",
            described.vocab_rows,
            described.max_context,
            "" if in_few_bits(fingerprint) else fingerprint.get("dtype", "float32"),
            classes=described.classes,
        )
        with self._at_work():
            canary.begin()
        return canary

    def _look(self) -> None:
        """Before a unit. Raises EngineError where the engine is not what it was."""
        if self._canary is not None:
            self._canary.count()

    def _score(self, rows: Rows, question: Question) -> SoftTargets:
        engine, spec = self._loaded(), question.as_dict()
        return self._together(lambda: engine.score(rows, question), "score", rows.table, spec)

    def _together(self, own: Callable[[], T], call: str, *args: Any) -> T:
        """What this process gives, with the other ranks if there are any."""
        return own() if self._ranks is None else self._ranks.together(own, call, *args)

    @contextmanager
    def _at_work(self) -> Iterator[Callable[[list], None]]:
        """Turns foreign errors into ours and counts a unit, told the ids it was about."""
        started = self._begun = time.monotonic()

        def done(ids: list) -> None:
            self._health = replace(
                self._health,
                units=self._health.units + 1,
                tokens=self._health.tokens + sum(map(len, ids)),
                busy_s=self._health.busy_s + time.monotonic() - started,
            )

        try:
            yield done
        except TutelageError:
            raise
        except Exception as error:  # foreign errors may not survive pickling
            lines = str(error).strip().splitlines() or [""]
            raise TeacherError(f"{type(error).__name__}: {lines[0]}") from None
        finally:
            self._begun = None

    def _export(self) -> None:
        """Set the gauges of the last seconds. Called by another thread."""
        now, health, busy_s = time.monotonic(), self._health, self._busy_s()
        self._seen.append((now, health.tokens, busy_s))
        while self._seen[1][0] < now - SPEED_S:
            self._seen.popleft()
        before, tokens, busy_before_s = self._seen[0]
        export, seconds = exporter.current(), max(now - before, 1e-9)
        export.set(exported.TEACHER_SPEED, (health.tokens - tokens) / seconds)
        export.set(exported.REPLICA_BUSY, min(1.0, max(0.0, (busy_s - busy_before_s) / seconds)))

    def _busy_s(self) -> float:
        """Seconds of work, with those of the unit under way."""
        begun = self._begun
        return self._health.busy_s + (time.monotonic() - begun if begun is not None else 0.0)

    def _loaded(self) -> Engine:
        if self._failure is not None:
            raise self._failure
        assert self._engine is not None, "an engine is loaded or its failure is kept"
        return self._engine

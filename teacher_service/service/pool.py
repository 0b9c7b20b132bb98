"""TeacherPool: one client's live connection to the replicas of a teacher service.

Keeps a bounded number of units under way, delivers answers in the order of submission, and alone
retries: a unit is resent whole, to another replica where there is one. Exactly once follows from
that and from the check of every answer against its rows.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from shared.data.rows import Rows
from shared.errors import TeacherError, TutelageError, UserError
from shared.in_words import counted
from shared.run import exported, exporter
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.lessons import Learnt, Lesson
from shared.targets.question import Question
from shared.targets.reader import ReaderStats
from shared.targets.soft_targets import SoftTargets
from teacher_service.service.roster import Roster
from teacher_service.service.scaling.demand import Report

SETTLE_S = 1.0
PUMP_S = 0.5
SAY_S = 30.0  # waited before it is said, and said again after twice as long
AGAIN = "this command started it and ends; the same command starts it again"
_CLOSED = "nobody waits for answers any more; the run has ended"

Asked = TypeVar("Asked", Rows, Openings)
Spec = TypeVar("Spec", Question, GenerationSpec, Lesson)
Answer = TypeVar("Answer", SoftTargets, Continuations, Learnt)


@dataclass(slots=True, eq=False)
class _Unit(Generic[Asked, Spec, Answer]):
    asked: Asked
    spec: Spec
    deadline: float | None = None  # set when the unit may first be sent
    ref: Any = None
    replica: str = ""
    sent_at: float = 0.0
    turn: int = 0  # position among all sends of the pool
    asked_at: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    answer: Answer | None = None
    error: TutelageError | None = None

    @property
    def settled(self) -> bool:
        return self.answer is not None or self.error is not None

    @property
    def num_bytes(self) -> int:
        """What it has on the wire or in the object store."""
        if self.answer is not None:
            return self.answer.num_bytes
        return self.asked.table.nbytes if self.ref is not None else 0

    @property
    def names(self) -> str:
        return ", ".join(dict.fromkeys(self.asked.names())) or "none"


class Pool(Generic[Asked, Spec, Answer]):
    """Units sent to live replicas, answered in order.

    `teacher` is the fingerprint the run began with; answers from another are refused. `run` and
    `rank` decide which replicas are preferred, so that clients spread. A service that is gone is
    waited for, unless it is the `own` one of its client, which nobody starts again. Raises
    ConfigError where there is no such service. `say` takes a line for people about a long wait.
    With `apart`, answers are taken by a thread whose time is nobody's: what it waits for them is
    reported as waited only while others are `waiting` for it.
    """

    _method: str  # of TeacherReplica
    _doing: str
    _answer: type[Answer]
    _who, _what, _see = "the teacher", "teacher service", "`tutelage teacher status`"

    def __init__(
        self,
        rank: int,
        *,
        service: str,
        run: str = "",
        teacher: Mapping[str, str] | None = None,
        in_flight: int = 3,
        unit_deadline_s: float = 600.0,
        max_unit_failures: int = 3,
        own: bool = False,
        apart: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self._say, self._is_apart = say, apart
        self._service, self._teacher, self._in_flight = service, teacher, in_flight
        self._own = own
        self._unit_deadline_s, self._max_unit_failures = unit_deadline_s, max_unit_failures
        self._roster = Roster(service, f"{run}/{rank}", in_flight + 1)
        self._units: deque[_Unit[Asked, Spec, Answer]] = deque()
        self._turns, self._most_units, self._closed = 0, 0, False
        self._stats = ReaderStats()
        self._run, self._client = run, uuid.uuid4().hex
        self._waited_s = 0.0  # since the first answer
        self._waits_since: float | None = None
        self._waiters, self._counting = 0, threading.Lock()
        exporter.current().sample(self._export)

    @property
    def stats(self) -> ReaderStats:
        """Counters since the pool was made."""
        return self._stats

    def submit(self, asked: Asked, spec: Spec) -> None:
        """Ask for a unit; at most `in_flight` are under way, further ones wait here. Raises
        TeacherError once the pool is closed."""
        if self._closed:
            raise TeacherError(_CLOSED)
        self._units.append(_Unit(asked, spec))
        self._pump(0.0)

    def next(self) -> Answer:
        """The oldest answer. Raises UserError or TeacherError, naming the rows."""
        unit, started = self._units[0], time.monotonic()
        with self.waiting():
            self._wait(unit, started)
        self._stats.wait_s += time.monotonic() - started
        if unit.error is not None:
            raise unit.error
        assert unit.answer is not None
        self._units.popleft()
        self._stats.units += 1
        self._stats.wire_bytes += unit.answer.num_bytes
        self._pump(0.0)
        return unit.answer

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Report as waited what a `with` waits for answers, once a first one has come."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        """Count who waits: one that takes answers and, where that is apart, one for whom it
        does."""
        with self._counting:
            now, since = time.monotonic(), self._waits_since
            self._waited_s += 0.0 if since is None else now - since
            self._waiters += change
            is_waited = self._waiters > self._is_apart and self._stats.units
            self._waits_since = now if is_waited else None

    def _wait(self, unit: _Unit[Asked, Spec, Answer], started: float) -> None:
        """Wait until a unit is settled."""
        patience_s = SAY_S
        while not unit.settled:
            self._pump(PUMP_S)
            if not unit.settled and time.monotonic() - started > patience_s:
                patience_s *= 2
                self._say_wait(unit, time.monotonic() - started)

    def _say_wait(self, unit: _Unit, waited_s: float) -> None:
        if self._say is None:
            return
        failed = f"; last {unit.failures[-1]}" if unit.failures else ""
        with suppress(OSError):  # a full disk ends no wait
            self._say(
                f"{self._what} {self._service} has not answered for rows {unit.names} for "
                f"{waited_s:.0f} s, {counted(len(self._roster.usable()), 'replica')} at work; it "
                f"is waited for up to {self._unit_deadline_s:g} s{failed}"
            )

    def close(self) -> None:
        """Drop what is under way; what a replica has not begun is cancelled. A thread that waits
        for an answer meanwhile gets an error."""
        self._closed = True
        for unit in tuple(self._units):
            if unit.ref is not None and not unit.settled:
                ray.cancel(unit.ref)
            unit.error = unit.error or TeacherError(_CLOSED)
        self._units.clear()
        export = exporter.current()
        export.leave(self._export)
        for metric in (exported.QUEUE_AGE, exported.UNITS_IN_FLIGHT, exported.BYTES_IN_FLIGHT):
            export.set(metric, None, service=self._service)

    def _export(self) -> None:
        """Set the gauges of what is under way. Called by another thread."""
        report = self._standing()
        values = {
            exported.QUEUE_AGE: report.queue_age_s,
            exported.UNITS_IN_FLIGHT: report.units,
            exported.BYTES_IN_FLIGHT: report.num_bytes,
        }
        for metric, value in values.items():
            exporter.current().set(metric, value, service=self._service)

    def _standing(self) -> Report:
        units, now = tuple(self._units), time.monotonic()
        with self._counting:
            since, waited_s = self._waits_since, self._waited_s
        unanswered = [unit for unit in units if not unit.settled]
        return Report(
            run=self._run,
            client=self._client,
            wait_s=waited_s + (max(0.0, now - since) if since is not None else 0.0),
            queue_age_s=max((now - unit.asked_at for unit in unanswered), default=0.0),
            units=sum(unit.ref is not None for unit in unanswered),
            most_units=self._most_units,
            num_bytes=sum(unit.num_bytes for unit in units),
        )

    def report(self) -> Report:
        """What the registry is told, once a second; counts the most units anew from then on."""
        report = self._standing()
        self._most_units = report.units
        return report

    def _pump(self, block_s: float) -> None:
        """Send what may be sent, and settle what has come within `block_s`."""
        self._roster.refresh()
        self._send()
        waiting = [unit.ref for unit in self._under_way()]
        refs = waiting if self._roster.poll is None else [*waiting, self._roster.poll]
        if refs:
            ray.wait(refs, num_returns=1, timeout=block_s)
        elif block_s:
            time.sleep(block_s)
        ready = set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]) if waiting else ()
        for unit in self._under_way():
            if unit.ref in ready:
                self._settle(unit)
        self._expire()
        self._send()
        self._roster.tell(self.report)

    def _send(self) -> None:
        for unit in list(self._units)[: self._in_flight]:
            if unit.settled or unit.ref is not None:
                continue
            unit.deadline = unit.deadline or time.monotonic() + self._unit_deadline_s
            names = self._roster.usable()
            load = {name: sum(u.replica == name for u in self._under_way()) for name in names}
            for name in sorted(names, key=lambda n: (n in unit.tried, load[n])):
                if (handle := self._roster.handle(name)) is not None:
                    method = getattr(handle, self._method)
                    unit.ref = method.remote(unit.asked.table, unit.spec.as_dict())
                    unit.replica, unit.sent_at = name, time.monotonic()
                    unit.turn = self._turns = self._turns + 1
                    break
        self._most_units = max(self._most_units, len(self._under_way()))

    def _settle(self, unit: _Unit) -> None:
        if unit.ref is None:
            return  # requeued because an older unit's replica died
        try:
            answer = self._answer(ray.get(unit.ref, timeout=SETTLE_S))
            answer.check(unit.asked, unit.spec, self._teacher)
            unit.answer, unit.ref = answer, None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError):
                unit.error, unit.ref = cause, None
            else:
                self._failed(unit, str(cause))
        except TeacherError as error:
            self._failed(unit, str(error))
        except GetTimeoutError:
            return
        except RayError as error:
            self._lost(unit.replica, type(error).__name__)

    def _lost(self, replica: str, reason: str) -> None:
        """A replica died: its oldest unit of ours was being scored, the others only waited."""
        self._roster.suspend(replica)
        victims = sorted(
            (u for u in self._under_way() if u.replica == replica), key=lambda u: u.turn
        )
        refs = [unit.ref for unit in victims]
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=SETTLE_S)[0])
        answered = [unit for unit in victims if unit.ref in ready and self._has_answer(unit)]
        lost = [unit for unit in victims if unit not in answered]
        for unit in answered:
            self._settle(unit)
        for position, unit in enumerate(lost):
            if position == 0:
                self._failed(unit, f"{replica} died while {self._doing} it ({reason})")
            else:
                self._requeue(unit)

    def _has_answer(self, unit: _Unit) -> bool:
        try:
            ray.get(unit.ref, timeout=SETTLE_S)
        except RayTaskError:
            return True
        except RayError:
            return False
        return True

    def _failed(self, unit: _Unit, reason: str) -> None:
        unit.failures.append(reason)
        self._requeue(unit)
        if len(unit.failures) >= self._max_unit_failures:
            unit.error = TeacherError(
                f"{self._who} failed {len(unit.failures)} times on the unit of rows {unit.names}; "
                f"the last time: {reason}; look at these rows and at the replicas' logs"
            )

    def _requeue(self, unit: _Unit) -> None:
        unit.tried.add(unit.replica)
        unit.ref, unit.replica = None, ""
        self._stats.retried_units += 1

    def _expire(self) -> None:
        now = time.monotonic()
        patience_s = self._unit_deadline_s / self._max_unit_failures
        for unit in self._units:
            if unit.settled or unit.deadline is None:
                continue
            slow = unit.ref is not None and now > unit.sent_at + patience_s
            if self._own and self._roster.gone:
                unit.error = TeacherError(f"{self._what} {self._service} is gone; {AGAIN}")
            elif now > unit.deadline:
                unit.error = TeacherError(self._too_late(unit))
            elif slow and set(self._roster.usable()) - {unit.replica}:
                self._roster.suspend(unit.replica)
                self._failed(unit, f"{unit.replica} did not answer within {patience_s:g} s")

    def _too_late(self, unit: _Unit) -> str:
        last = f"; the last failure: {unit.failures[-1]}" if unit.failures else ""
        return (
            f"no replica of {self._what} {self._service} answered for rows {unit.names} within "
            f"{self._unit_deadline_s:g} s{last}; see {self._see}, or raise "
            "service.unit_deadline_s"
        )

    def _under_way(self) -> list[_Unit]:
        return [unit for unit in self._units if unit.ref is not None and not unit.settled]


class TeacherPool(Pool[Rows, Question, SoftTargets]):
    """A rank's `TargetReader` over live replicas."""

    _method, _doing, _answer = "score", "scoring", SoftTargets


class GenerationPool(Pool[Openings, GenerationSpec, Continuations]):
    """Batches of openings, continued by live replicas."""

    _method, _doing, _answer = "generate", "continuing", Continuations


class RolloutPool(GenerationPool):
    """The same by copies of a student."""

    _who, _what, _see = "a copy of the student", "rollout service", "`tutelage status`"


class LessonPool(Pool[Rows, Lesson, Learnt]):
    """Updates of a teacher's modules, each by one of its replicas; a `ModuleTrainer`."""

    _method, _doing, _answer = "learn", "learning from", Learnt


open_pool = TeacherPool  # with functools.partial over the settings, an `OpenReader`
